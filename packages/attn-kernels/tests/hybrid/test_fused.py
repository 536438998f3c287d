"""The kernels of hybrid attention equal its reference, in the interpreter on the CPU or on the GPU."""

import pytest
import torch
from attn_kernels import TokenGrid, softmax_attention
from attn_kernels.hybrid import fit_projection, hybrid_attention
from attn_kernels.testing import assert_close, make_qkv
from attn_kernels.triton_support import refuse_fused

HERE = "cpu" if refuse_fused("fused", torch.empty(0)) is None else "cuda"
if HERE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter or a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")

GRIDS = (TokenGrid(5, 9, 13), TokenGrid(124, 3, 4))
LENGTH = 139
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]


def draw(batch, heads, queries, keys, width, columns, dtype=torch.float32, std=1.5):
    """Tokens with a mean of their own, so that centring has something to do."""
    q, k, v = make_qkv(batch, heads, queries, width, kv_tokens=keys, value_width=columns, logit_std=std)
    shift = torch.linspace(-0.5, 1.0, width)
    return [x.to(dtype).to(HERE) for x in (q + 0.3 * shift, k + shift, v + 0.2)]


def mask_for(batch, keys):
    return (torch.rand(batch, keys, generator=torch.Generator().manual_seed(1)) < 0.7).to(HERE)


def assert_same(tensors, ratio, key_mask=None, rank=6, **options):
    q, k, v = tensors
    wide = [x.float() for x in tensors]
    projection = None if "low" in options else fit_projection(*wide[:2], rank=rank, key_mask=key_mask)
    part = hybrid_attention(q, k, v, projection, key_mask=key_mask, impl="fused", **options)
    expected = hybrid_attention(*wide, projection, key_mask=key_mask, impl="reference", **options)
    assert part.out.dtype == v.dtype
    assert part.lse.dtype == torch.float32
    assert_close("out", part.out, expected.out, ratio)
    assert_close("lse", part.lse, expected.lse, ratio)
    return part


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize(
    ("shape", "terms", "rank", "near", "masked"),
    [
        ((2, 2, 63, 63, 24, 24), 3, 6, {"window": 9}, False),
        ((1, 1, 150, 90, 40, 20), 3, 16, {"window": 20, "prefix": 37}, True),
        ((2, 1, 70, 201, 80, 33), 4, 5, {"window": 3, "prefix": 5, "chunk": 16}, True),
        ((1, 1, 65, 65, 16, 70), 5, 3, {"window": 0}, False),
    ],
)
def test_1d_equals_the_reference(dtype, ratio, shape, terms, rank, near, masked):
    tensors = draw(*shape, dtype)
    key_mask = mask_for(shape[0], shape[3]) if masked else None
    assert_same(tensors, ratio, key_mask, rank, terms=terms, weight=0.8, **near)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize("near", [{"window": 7, "prefix": 11}, {"grids": [TokenGrid(5, 6, 7)], "radius": 1}], ids=str)
def test_the_additive_form_equals_the_reference(dtype, ratio, near):
    tensors = draw(2, 1, 50, 50, 20, 12, dtype)
    assert_same(tensors, ratio, mask_for(2, 50), 5, combine="additive", weight=0.3, **near)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize(
    ("width", "columns", "radius", "exact_queries", "masked"),
    [(24, 24, 2, "exact", False), (64, 20, (1, 6), "local", True), (16, 72, (30, 0), "local", False)],
)
def test_2d_equals_the_reference(dtype, ratio, width, columns, radius, exact_queries, masked):
    tensors = draw(1, 1, LENGTH, LENGTH, width, columns, dtype)
    key_mask = mask_for(1, LENGTH) if masked else None
    assert_same(tensors, ratio, key_mask, grids=GRIDS, radius=radius, exact_queries=exact_queries)


@pytest.mark.parametrize(("terms", "centre"), [(1, True), (2, True), (5, False), (8, True)])
def test_every_number_of_terms(terms, centre):
    q, k, v = draw(1, 1, 40, 50, 12, 8, std=0.8)
    assert_same((q, k, v), 1e-5, mask_for(1, 50), 3, window=4, terms=terms, centre=centre, scale=0.2)


@pytest.mark.parametrize("combine", ["shared", "additive"])
def test_low_vectors_of_ones_own(combine):
    q, k, v = draw(2, 2, 45, 61, 20, 8)
    key_mask = mask_for(2, 61)
    low = (q[..., :5].double(), k[..., 1:6].double())
    # Whatever a masked token holds must not be seen.
    low[1].masked_fill_(~key_mask[:, None, :, None], torch.nan)
    clean = (low[0].float(), low[1].float())
    assert_same((q, k, v), 1e-5, key_mask, low=clean, low_scale=-0.1, window=5, combine=combine)
    assert_same((q, k, v), 1e-5, key_mask, low=clean, low_scale=-0.1, window=5, combine=combine, centre=False)


def test_a_window_over_all_keys_is_exact():
    q, k, v = draw(1, 2, 66, 66, 24, 8, std=2.0)
    exact = softmax_attention(q, k, v)
    for near in ({"window": 99}, {"window": 0, "prefix": 66}, {"grids": [TokenGrid(0, 6, 11)], "radius": 11}):
        part = assert_same((q, k, v), 1e-5, **near)
        assert_close("out", part.out, exact.out, 1e-5)
        assert_close("lse", part.lse, exact.lse, 1e-5)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
def test_strong_logits_near_by_are_not_lost_in_the_sums(dtype, ratio):
    # The exponentials near by are thousands of times what the series says of the same pairs.
    grid = TokenGrid(0, 10, 11)
    q, k, v = (x.to(dtype).to(HERE) for x in make_qkv(1, 2, 110, 24, logit_std=4.0, smooth_grid=grid))
    assert_same((q, k, v), ratio, grids=[grid], radius=2)


def test_a_last_block_of_a_single_key_is_seen():
    # 65 keys: one more than blocks of 16, 32 or 64 hold.
    tensors = draw(1, 1, 65, 65, 16, 16, std=3.0)
    assert_same(tensors, 1e-5, window=200)
    assert_same(tensors, 1e-5, window=0, prefix=65)
    assert_same(tensors, 1e-5, grids=[TokenGrid(0, 5, 13)], radius=3)


def test_a_negative_scale_and_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(2, 2, 40, 40, 8, 8))
    assert_same((q, k, v), 1e-5, window=3, scale=-0.3)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert_same(turned, 1e-5, mask_for(40, 2).T, window=3)


def test_rows_without_keys_and_masked_nan():
    q, k, v = draw(2, 2, 40, 50, 8, 8)
    key_mask = mask_for(2, 50)
    key_mask[1] = False
    projection = fit_projection(q, k, rank=4, key_mask=key_mask)
    hole = ~key_mask[:, None, :, None]
    holed = (q, k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.inf))
    options = {"window": 4, "prefix": 3, "key_mask": key_mask}
    part = hybrid_attention(*holed, projection, impl="fused", **options)
    expected = hybrid_attention(*holed, projection, impl="reference", **options)
    assert_close("out", part.out, expected.out, 1e-5)
    assert_close("lse", part.lse[0], expected.lse[0], 1e-5)
    assert (part.out[1] == 0).all()
    assert (part.lse[1] == -torch.inf).all()
    # Nothing near, and the far part off: a query without keys.
    key_mask[0, :20] = False
    part = hybrid_attention(*holed, projection, window=4, weight=0.0, key_mask=key_mask, impl="fused")
    assert (part.out[0, :, :16] == 0).all()
    assert (part.lse[0, :, :16] == -torch.inf).all()
    empty = hybrid_attention(q[:, :, :0], k, v, projection, window=4, impl="fused")
    assert empty.out.shape == (2, 2, 0, 8)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_never_hidden(which):
    tensors = draw(1, 2, 40, 40, 8, 8)
    projection = fit_projection(*tensors[:2], rank=4)
    tensors[which][0, 1, 21, 3] = torch.nan
    part = hybrid_attention(*tensors, projection, window=4, impl="fused")
    seen = part.out[0, 1].isnan().any(dim=-1)
    assert seen.all() if which else seen[21]
    assert part.out[0, 0].isfinite().all()


def test_a_negative_denominator_is_nan_and_never_a_number():
    q, k, v = (x.to(HERE) for x in make_qkv(1, 1, 60, 8, logit_std=6.0))
    projection = fit_projection(q, k, rank=8)
    options = {"window": 0, "terms": 2, "weight": 50.0, "centre": False}
    part, expected = (hybrid_attention(q, k, v, projection, impl=impl, **options) for impl in ("fused", "reference"))
    bad = expected.lse.isnan()
    assert 0 < bad.sum() < 60
    assert torch.equal(part.lse.isnan(), bad)
    assert torch.equal(part.out.isnan().all(-1), bad)
    assert_close("out", part.out[~bad], expected.out[~bad], 1e-4)


def test_equal_inputs_give_equal_bits():
    q, k, v = draw(1, 1, 40, 300, 8, 16)
    projection = fit_projection(q, k, rank=4)
    one, two = (hybrid_attention(q, k, v, projection, window=9, impl="fused") for _ in range(2))
    assert torch.equal(one.out, two.out)
    assert torch.equal(one.lse, two.lse)


def test_refusals():
    q, k, v = draw(1, 1, 20, 20, 8, 8)
    projection = fit_projection(q, k, rank=4)
    wide = q.new_zeros(1, 1, 20, 300)
    for tensors, low, message in [
        ((q.double(), k.double(), v.double()), None, "float64"),
        ((q, k, wide), None, "wider than 128"),
        ((q, k, v), (wide, wide), "more than 32 coordinates"),
        ((q.clone().requires_grad_(), k, v), None, "no gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            hybrid_attention(*tensors, projection if low is None else None, low=low, window=1, impl="fused")
