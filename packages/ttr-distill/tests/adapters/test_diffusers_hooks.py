from collections.abc import Callable
from typing import Any

import pytest
import torch
from attn_dispatch.testing import RecordingHandler
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from ttr_distill.adapters.diffusers import DiffusersHost

diffusers = pytest.importorskip("diffusers")

WORDS = 5
NAMES = ("double:0", "double:1", "single:0", "single:1", "single:2")


InputsMaker = Callable[..., dict[str, Any]]
IdsMaker = Callable[..., Tensor]
Check = Callable[[nn.Module], None]
HandlerMaker = Callable[..., RecordingHandler]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_leaves_nothing_behind(
    flux: nn.Module,
    error: BaseException,
    after: int,
    make_inputs: InputsMaker,
    assert_untouched: Check,
    raising: HandlerMaker,
) -> None:
    inputs = make_inputs()
    with torch.inference_mode():
        expected = flux(**inputs)[0]
        with pytest.raises(type(error)) as caught, DiffusersHost(flux, raising(error, after)):
            flux(**inputs)
        assert caught.value is error
        assert_untouched(flux)
        assert torch.equal(flux(**inputs)[0], expected)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_run_goes_on_after_an_error_inside_the_context(
    flux: nn.Module, error: BaseException, make_inputs: InputsMaker, assert_untouched: Check, raising: HandlerMaker
) -> None:
    handler = raising(error, 3)
    with torch.no_grad(), DiffusersHost(flux, handler):
        with pytest.raises(type(error)):
            flux(**make_inputs())
        handler.after = -1
        flux(**make_inputs())
    assert tuple(str(call.layer) for call in handler.calls[3:]) == NAMES
    assert_untouched(flux)


def test_after_an_error_nothing_more_is_caught(
    flux: nn.Module, make_inputs: InputsMaker, raising: HandlerMaker
) -> None:
    handler = raising(RuntimeError("bug"), 3)
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), DiffusersHost(flux, handler):
        with pytest.raises(RuntimeError, match="bug"):
            flux(**make_inputs())
        handler.after = -1
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert _get_current_function_mode_stack() == []
    assert len(handler.calls) == 3


def test_hooks_of_others_run_outside_the_mode(flux: nn.Module, make_inputs: InputsMaker) -> None:
    depth: list[int] = []
    attention = flux.get_submodule("transformer_blocks.0.attn")

    def look(module: nn.Module, args: object, output: object) -> None:
        depth.append(len(_get_current_function_mode_stack()))

    before = attention.register_forward_hook(look)
    with torch.no_grad(), DiffusersHost(flux, RecordingHandler()), DiffusersHost(flux, RecordingHandler()):
        after = attention.register_forward_hook(look)
        flux(**make_inputs())
        after.remove()
    before.remove()
    assert depth == [0, 0]


def test_an_interrupt_in_nested_hosts_leaves_nothing_behind(
    flux: nn.Module, make_inputs: InputsMaker, assert_untouched: Check, raising: HandlerMaker
) -> None:
    outer, inner = DiffusersHost(flux, RecordingHandler()), DiffusersHost(flux, raising(KeyboardInterrupt(), 2))
    with pytest.raises(KeyboardInterrupt), outer, inner:
        flux(**make_inputs())
    assert_untouched(flux)


def test_an_error_before_our_hook_leaves_nothing_behind(
    flux: nn.Module, make_inputs: InputsMaker, assert_untouched: Check
) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("another hook")

    attention = flux.get_submodule("single_transformer_blocks.1.attn")
    foreign = attention.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="another hook"), DiffusersHost(flux, RecordingHandler()):
            flux(**make_inputs())
    finally:
        foreign.remove()
    assert_untouched(flux)


def test_hosts_nest(flux: nn.Module, make_inputs: InputsMaker, assert_untouched: Check) -> None:
    inputs = make_inputs()
    outer, inner = RecordingHandler(), RecordingHandler()
    with torch.inference_mode():
        expected = flux(**inputs)[0]
        with DiffusersHost(flux, outer, cfg_scale=2.0):
            with DiffusersHost(flux, inner, cfg_scale=5.0):
                assert torch.equal(flux(**inputs)[0], expected)
            assert (len(outer.calls), len(inner.calls)) == (5, 5)
            flux(**inputs)
    assert (len(outer.calls), len(inner.calls)) == (10, 5)
    assert {call.step.cfg_scale for call in outer.calls if call.step} == {2.0}
    assert {call.step.cfg_scale for call in inner.calls if call.step} == {5.0}
    assert tuple(str(call.layer) for call in outer.calls[:5]) == NAMES
    assert_untouched(flux)


def test_the_inner_host_answers_first(flux: nn.Module, make_inputs: InputsMaker, constant: HandlerMaker) -> None:
    outer, inner = RecordingHandler(), constant()
    with torch.no_grad(), DiffusersHost(flux, outer), DiffusersHost(flux, inner):
        flux(**make_inputs())
    assert (len(outer.calls), len(inner.calls)) == (0, 5)


def test_a_host_can_be_entered_again_but_not_twice_at_once(
    flux: nn.Module, make_inputs: InputsMaker, assert_untouched: Check
) -> None:
    handler = RecordingHandler()
    host = DiffusersHost(flux, handler)
    for _ in range(2):
        with torch.no_grad(), host:
            flux(**make_inputs())
    assert len(handler.calls) == 10
    with host, pytest.raises(ValueError, match="entered already"), host:
        pass
    assert_untouched(flux)


def test_outside_attention_modules_nothing_is_caught(flux: nn.Module, make_inputs: InputsMaker) -> None:
    handler = RecordingHandler()
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    depth: list[int] = []
    mlp = flux.get_submodule("single_transformer_blocks.0.proj_mlp")
    watch = mlp.register_forward_pre_hook(lambda module, args: depth.append(len(_get_current_function_mode_stack())))
    try:
        with torch.no_grad(), DiffusersHost(flux, handler):
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            flux(**make_inputs())
    finally:
        watch.remove()
    assert depth == [0]
    assert len(handler.calls) == 5
