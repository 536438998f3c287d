import pytest
from attn_kernels.impl import Impl, resolve_impl


def test_auto_takes_the_first_that_can_run_in_order_of_preference():
    assert resolve_impl("auto", {Impl.REFERENCE: None, Impl.BLOCKED: None, Impl.FUSED: None}) is Impl.FUSED
    assert resolve_impl("auto", {Impl.REFERENCE: None, Impl.BLOCKED: None, Impl.FUSED: "no GPU"}) is Impl.BLOCKED
    assert resolve_impl(Impl.AUTO, {Impl.REFERENCE: None, Impl.BLOCKED: "no"}) is Impl.REFERENCE


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(ValueError, match="'fused' cannot run here: no GPU"):
        resolve_impl("fused", {Impl.REFERENCE: None, Impl.FUSED: "no GPU"})
    with pytest.raises(ValueError, match="has no impl 'fused'; it has 'reference'"):
        resolve_impl("fused", {Impl.REFERENCE: None})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'auto', 'reference', 'blocked', 'fused', got 'triton'"):
        resolve_impl("triton", {Impl.REFERENCE: None})


def test_nothing_that_can_run_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match="because"):
        resolve_impl("auto", {Impl.REFERENCE: "because"})
