import pytest
import torch
from attn_kernels import Partial, merge_partials, softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st


def attend(q, k, v, chosen):
    return softmax_attention(q, k[:, :, chosen], v[:, :, chosen])


@settings(max_examples=40, deadline=None)
@given(
    keys=st.integers(1, 40), parts=st.integers(1, 6), seed=st.integers(0, 999), spread=st.sampled_from([1.0, 4.0, 60.0])
)
def test_a_merged_partition_is_one_softmax(keys, parts, seed, spread):
    q, k, v = make_qkv(2, 2, 7, 8, kv_tokens=keys, value_width=5, logit_std=spread, seed=seed)
    owner = torch.randint(parts, (keys,), generator=torch.Generator().manual_seed(seed))
    partials = [attend(q, k, v, owner == part) for part in range(parts) if (owner == part).any()]
    merged = merge_partials(*partials)
    scores = (q.double() @ k.double().mT) / 8**0.5
    assert_close("out", merged.out, scores.softmax(-1) @ v.double(), 2e-6 * max(1.0, spread / 4))
    assert_close("lse", merged.lse, scores.logsumexp(-1), 1e-6)


def test_merging_does_not_depend_on_grouping():
    q, k, v = make_qkv(1, 2, 9, 8, kv_tokens=30)
    a, b, c = (attend(q, k, v, slice(start, start + 10)) for start in (0, 10, 20))
    together, nested = merge_partials(a, b, c), merge_partials(a, merge_partials(b, c))
    assert_close("out", nested.out, together.out, 1e-6)
    assert_close("lse", nested.lse, together.lse, 1e-6)


@pytest.mark.parametrize("filler", [0.0, torch.nan, torch.inf])
def test_an_empty_part_contributes_nothing_whatever_it_holds(filler):
    q, k, v = make_qkv(1, 1, 5, 4)
    full = softmax_attention(q, k, v)
    empty = Partial(torch.full_like(full.out, filler), torch.full_like(full.lse, -torch.inf))
    for merged in (merge_partials(full, empty), merge_partials(empty, full)):
        assert torch.equal(merged.out, full.out)
        assert torch.equal(merged.lse, full.lse)
    nothing = merge_partials(empty, empty)
    assert (nothing.out == 0).all()
    assert (nothing.lse == -torch.inf).all()


def test_gradients_through_an_empty_part_are_finite_and_right():
    q, k, v = (x.double().requires_grad_() for x in make_qkv(1, 2, 5, 4))
    full = softmax_attention(q, k, v)
    empty_lse = torch.full_like(full.lse, -torch.inf).requires_grad_()
    empty_out = torch.full_like(full.out, torch.inf).requires_grad_()
    merged = merge_partials(full, Partial(empty_out, empty_lse))
    grads = torch.autograd.grad(merged.out.square().sum(), (q, k, v, empty_lse, empty_out), retain_graph=True)
    assert all(torch.isfinite(grad).all() for grad in grads)
    for got, expected in zip(grads[:3], torch.autograd.grad(full.out.square().sum(), (q, k, v)), strict=True):
        assert_close("gradient", got, expected, 1e-12)


def test_gradcheck():
    generator = torch.Generator().manual_seed(3)
    outs = [torch.randn(1, 2, 3, 2, generator=generator, dtype=torch.double, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, generator=generator, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge_partials(*map(Partial, x[:3], x[3:])), (*outs, *lses))


def test_a_nan_part_is_not_hidden():
    q, k, v = make_qkv(1, 1, 4, 4)
    v[0, 0, 1, 0] = torch.nan
    merged = merge_partials(attend(q, k, v, slice(0, 2)), attend(q, k, v, slice(2, 4)))
    assert merged.out[..., 0].isnan().all()


def test_half_precision_keeps_its_dtype():
    q, k, v = make_qkv(1, 2, 9, 8, kv_tokens=30, dtype=torch.bfloat16)
    merged = merge_partials(attend(q, k, v, slice(0, 10)), attend(q, k, v, slice(10, 30)))
    assert merged.out.dtype == torch.bfloat16
    assert merged.lse.dtype == torch.float32
    assert_close("out", merged.out, softmax_attention(q, k, v).out, 6e-3)


def test_wrong_shapes_are_named():
    part = Partial(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="at least one"):
        merge_partials()
    with pytest.raises(ValueError, match="partial 1 has out"):
        merge_partials(part, Partial(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5)))
    with pytest.raises(ValueError, match="partial 0 has out"):
        merge_partials(Partial(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4)), part)
