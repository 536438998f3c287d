import pytest
import torch
from attn_kernels import TaylorConfig, softmax_attention, taylor_attention
from attn_kernels.testing import assert_close, error_ratio, make_qkv


def test_automatic_choice_is_blocked_on_a_cpu_and_the_reference_where_a_gradient_is_wanted(series):
    q, k, v = series.make_case()
    blocked, reference = (taylor_attention(q, k, v, impl=impl) for impl in ("blocked", "reference"))
    assert torch.equal(taylor_attention(q, k, v).out, blocked.out)
    assert torch.equal(taylor_attention(q.requires_grad_(), k, v).out.detach(), reference.out)


def test_the_default_scale_is_that_of_the_width_it_is_given(series):
    q, k, v = series.make_case(width=4)
    assert_close("scale", taylor_attention(q, k, v).out, taylor_attention(q, k, v, scale=0.5).out, 1e-7)
    # Projected queries and keys keep the scale of the head: the values may be wider or narrower.
    wide = taylor_attention(q[..., :2], k[..., :2], v, scale=128**-0.5)
    assert wide.out.shape == (2, 3, 37, 9)
    expected, _, _ = series.pairwise(q[..., :2], k[..., :2], v, 3, scale=128**-0.5)
    assert_close("projected", wide.out, expected, 1e-5)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_scale_of_zero_is_the_mean_and_a_negative_one_is_lawful(series, impl):
    q, k, v = series.make_case()
    part = taylor_attention(q, k, v, scale=0.0, terms=4, impl=impl)
    assert_close("mean", part.out, v.mean(2, keepdim=True).expand_as(part.out), 1e-6)
    out, lse, _ = series.pairwise(q, k, v, 3, scale=-0.3)
    part = taylor_attention(q, k, v, scale=-0.3, impl=impl)
    assert_close("negative", part.out, out, 1e-5)
    assert_close("lse", part.lse, lse, 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficients": "chebyshev"}, "coefficients"),
        ({"coefficients": "hermite", "centre": False}, "centre"),
        ({"hermite_limit": -1.0}, "hermite_limit"),
        ({"hermite_limit": float("nan")}, "hermite_limit"),
        ({"blocks": 0}, "blocks"),
        ({"blocks": 2}, "independent"),
        ({"mode": "shared"}, "mode"),
        ({"path": "fast"}, "path"),
        ({"store": "float16"}, "store"),
        ({"feature_chunk": 0}, "feature_chunk"),
        ({"value_chunk": 0}, "value_chunk"),
        ({"key_chunk": -1}, "key_chunk"),
        ({"eps": -1e-3}, "eps"),
        ({"eps": 1.0}, "eps"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaylorConfig(**settings)


def test_wrong_arguments_are_refused(series):
    q, k, v = series.make_case()
    blocks = TaylorConfig(blocks=3, mode="independent")
    for arguments, message in (
        ({"terms": 0}, "terms must be in 1..8"),
        ({"terms": 9}, "terms must be in 1..8"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"key_mask": torch.ones(2, 53)}, "bool"),
        ({"key_mask": torch.ones(2, 52, dtype=torch.bool)}, "key_mask must be"),
        ({"impl": "fastest"}, "impl must be one of"),
        ({"config": blocks}, "explicit scale"),
        ({"config": TaylorConfig(blocks=4, mode="independent"), "scale": 1.0}, r"q \(2, 3, 37, 6\)"),
        ({"config": TaylorConfig(blocks=2, mode="independent"), "scale": 1.0}, r"v \(2, 3, 53, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            taylor_attention(q, k, v, **arguments)
    with pytest.raises(ValueError, match="share the head width"):
        taylor_attention(q[..., :4], k, v)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize("terms", [1, 3, 4, 5])
def test_no_value_is_read(terms, path, impl):
    # Tensors on the meta device have no values, so reading one raises.
    q, k, v = (torch.empty(2, 3, 60, 8, device="meta") for _ in range(3))
    mask = torch.empty(2, 60, dtype=torch.bool, device="meta")
    config = TaylorConfig(path=path, coefficients="hermite", blocks=2, mode="independent", store="bfloat16")
    part = taylor_attention(q, k, v, terms=terms, scale=0.3, key_mask=mask, config=config, impl=impl)
    assert part.out.shape == (2, 3, 60, 8)
    assert part.lse.shape == (2, 3, 60)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_inference_mode_leaves_nothing_behind(impl):
    q, k, v = make_qkv(1, 2, 40, 8, logit_std=0.5)
    with torch.inference_mode():
        first = taylor_attention(q, k, v, terms=4, impl=impl).out.clone()
    q.requires_grad_(impl == "reference")
    again = taylor_attention(q, k, v, terms=4, impl=impl)
    assert_close("again", again.out.detach(), first, 1e-6)
    if impl == "reference":
        again.out.sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().min()


def test_realistic_logits_are_told_from_the_mean_of_the_values():
    q, k, v = make_qkv(1, 2, 200, 16, logit_std=1.0)
    exact = softmax_attention(q, k, v).out
    assert error_ratio(taylor_attention(q, k, v, terms=5).out, exact) < 0.25
    assert error_ratio(v.mean(2, keepdim=True), exact) > 0.7
