"""The Triton kernels, run by the interpreter, equal the reference."""

import pytest
import torch
from attn_kernels import (
    NearFarConfig,
    NearFarCorrections,
    TokenGrid,
    near_far_attention,
    select_tiles,
    softmax_attention,
)
from attn_kernels.near_far.tiles import tile_total
from attn_kernels.testing import assert_close, make_qkv
from attn_kernels.triton_support import interpreted

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("Triton's interpreter is off", allow_module_level=True)

from attn_kernels.near_far import fused as module
from attn_kernels.near_far.fused_config import AttendConfig

TWO = (TokenGrid(110, 7, 5), TokenGrid(3, 9, 11))
"""Tokens before, between and after the grids; neither a multiple of any tile; not in the order of the sequence."""
SMALL = AttendConfig(32, 16, 4, 1)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Take the blocks of a large GPU: the interpreter's time goes by operations, not by their size."""
    monkeypatch.setattr(module, "attend_config", lambda *_: AttendConfig(64, 64, 4, 1))


def mask_of(length, kept=0.6):
    return torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < kept


def corrections_of(heads):
    return NearFarCorrections(torch.linspace(0.8, 1.2, heads), torch.linspace(0.4, -0.3, heads))


def assert_same(q, k, v, *, ratio=2e-6, **options):
    part = near_far_attention(q, k, v, impl="fused", **options)
    expected = near_far_attention(q.float(), k.float(), v.float(), impl="reference", **options)
    assert part.out.dtype == v.dtype
    assert part.lse.dtype == torch.float32
    rows = slice(None)
    if options.get("key_mask") is not None and options["config"].top_k and "selection" not in options:
        # A tile of masked tokens has no mean query: all far tiles are equally good to it, and its choice is free.
        tokens = torch.arange(q.shape[2])
        in_grid = torch.stack([(tokens >= g.start) & (tokens < g.stop) for g in options["grids"]]).any(0)
        rows = (options["key_mask"] | ~in_grid)[:, None].expand(-1, q.shape[1], -1)
    assert_close("out", part.out[rows], expected.out[rows], ratio)
    assert_close("lse", part.lse[rows], expected.lse[rows], ratio)
    return part


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tile", "radius", "top_k", "exact_queries"),
    [
        (4, 1, 0, "exact"),
        (4, 1, 2, "pooled"),
        ((2, 3), 1, 4, "exact"),
        ((2, 3), 0, 2, "pooled"),
        (3, 0, 2, "exact"),
        ((1, 5), 2, 0, "pooled"),
    ],
)
def test_equals_the_reference_on_ragged_grids(tile, radius, top_k, exact_queries, masked):
    heads = 2 if masked else 1
    q, k, v = make_qkv(2, heads, 149, 24, value_width=40, logit_std=3.0, seed=1)
    options = {"key_mask": mask_of(149), "corrections": corrections_of(heads)} if masked else {}
    assert_same(q, k, v, grids=TWO, config=NearFarConfig(tile, radius, top_k, exact_queries), **options)


@pytest.mark.parametrize(("tile", "top_k"), [(8, 2), (8, 0), (4, 4)])
def test_many_blocks_of_one_grid(tile, top_k):
    # 20 x 27 tokens: tiles at the right and lower edge are cut, and a group of two tiles hangs over.
    grid = TokenGrid(17, 20, 27)
    q, k, v = make_qkv(1, 1, grid.stop, 16, logit_std=3.0, smooth_grid=grid)
    config = NearFarConfig(tile, 0 if tile == 8 else 1, top_k)
    assert_same(q, k, v, grids=[grid], config=config)


@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (128, 16)])
def test_any_block_sizes(queries, keys, monkeypatch):
    monkeypatch.setattr(module, "attend_config", lambda *_: AttendConfig(queries, keys, 4, 1))
    q, k, v = make_qkv(1, 1, 149, 16, logit_std=3.0)
    mask = mask_of(149)[:1]
    for tile in (3, 5):
        assert_same(q, k, v, grids=TWO, config=NearFarConfig(tile, 1, 2), key_mask=mask)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision(dtype, ratio, masked):
    q, k, v = make_qkv(1, 2, 149, 32, dtype=dtype, logit_std=3.0)
    config = NearFarConfig(4, 1, 2)
    chosen = select_tiles(q, k, grids=TWO, config=config)
    options = {"key_mask": mask_of(149)[:1], "corrections": corrections_of(2)} if masked else {}
    assert_same(q, k, v, grids=TWO, config=config, selection=chosen, ratio=ratio, **options)
    mean = v.float().mean(2, keepdim=True).expand_as(v)
    expected = near_far_attention(q.float(), k.float(), v.float(), grids=TWO, config=config).out
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("the mean of v", mean, expected, 50 * ratio)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.05])
def test_any_scale(scale, monkeypatch):
    monkeypatch.setattr(module, "attend_config", lambda *_: SMALL)
    q, k, v = make_qkv(1, 2, 40, 8)
    config = NearFarConfig(2, 0, 0 if scale == 0 else 2)
    assert_same(q, k, v, grids=[TokenGrid(4, 6, 6)], config=config, scale=scale, corrections=corrections_of(2))


@pytest.mark.parametrize("config", [NearFarConfig(1, 0, 0), NearFarConfig(2, 0, 99), NearFarConfig(2, 9, 3)])
def test_exact_limits(config):
    q, k, v = make_qkv(1, 1, 45, 8, logit_std=4.0)
    part = near_far_attention(q, k, v, grids=[TokenGrid(3, 6, 7)], config=config, impl="fused")
    exact = softmax_attention(q, k, v)
    assert_close("out", part.out, exact.out, 2e-6)
    assert_close("lse", part.lse, exact.lse, 2e-6)


def test_a_tile_larger_than_a_program_is_answered_in_parts(monkeypatch):
    monkeypatch.setattr(module, "attend_config", lambda *_: SMALL)
    q, k, v = make_qkv(1, 1, 153, 8, logit_std=3.0)
    assert_same(q, k, v, grids=[TokenGrid(3, 10, 15)], config=NearFarConfig((10, 5), 0, 1))


def test_only_image_tokens_and_views_of_packed_tensors():
    packed = torch.cat(make_qkv(2, 2, 60, 16, logit_std=3.0), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = packed.chunk(3, dim=-1)
    assert not q.is_contiguous()
    assert_same(q, k, v, grids=[TokenGrid(0, 6, 10)], config=NearFarConfig(2, 1, 2))
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    assert_same(*turned, grids=[TokenGrid(0, 6, 10)], config=NearFarConfig(2, 1, 2))


def test_a_given_choice_may_repeat_be_near_or_not_exist():
    q, k, v = make_qkv(1, 2, 149, 16, logit_std=3.0)
    config = NearFarConfig(4, 1, 6)
    tiles = tile_total(TWO, (4, 4))
    chosen = torch.randint(-3, tiles, (1, 2, tiles, 6), generator=torch.Generator().manual_seed(5)).clamp(min=-1)
    chosen[..., 3] = chosen[..., 1]
    assert_same(q, k, v, grids=TWO, config=config, selection=chosen)
    beyond = torch.where(chosen < 0, tiles + 7, chosen)
    part = near_far_attention(q, k, v, grids=TWO, config=config, selection=beyond, impl="fused")
    expected = near_far_attention(q, k, v, grids=TWO, config=config, selection=chosen, impl="fused")
    assert torch.equal(part.out, expected.out)


@pytest.mark.parametrize("exact_queries", ["exact", "pooled"])
def test_queries_without_keys_get_zeros(exact_queries):
    q, k, v = make_qkv(2, 1, 60, 8)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1] = False
    config = NearFarConfig(2, 1, 2, exact_queries)
    part = assert_same(q, k, v, grids=[TokenGrid(4, 7, 8)], config=config, key_mask=mask)
    assert (part.out[1] == 0).all()
    assert (part.lse[1] == -torch.inf).all()


def test_masked_tokens_may_hold_anything():
    q, k, v = make_qkv(2, 1, 149, 8)
    mask = mask_of(149)
    config = NearFarConfig((2, 3), 1, 2)
    part = near_far_attention(q, k, v, grids=TWO, config=config, key_mask=mask, impl="fused")
    drop = ~mask[:, None, :, None]
    poisoned = [x.masked_fill(drop, torch.nan) for x in (q, k, v)]
    other = near_far_attention(*poisoned, grids=TWO, config=config, key_mask=mask, impl="fused")
    kept = mask[:, None]
    assert torch.equal(other.out[kept], part.out[kept])
    assert torch.equal(other.lse[kept], part.lse[kept])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("token", [1, 40])
def test_nan_in_an_input_never_becomes_a_finite_wrong_output(which, token, monkeypatch):
    monkeypatch.setattr(module, "attend_config", lambda *_: AttendConfig(64, 32, 4, 1))
    tensors = make_qkv(1, 2, 60, 8)
    tensors[which][0, 1, token, 3] = torch.nan
    part = near_far_attention(*tensors, grids=[TokenGrid(4, 7, 8)], config=NearFarConfig(3, 0, 1), impl="fused")
    exact_is_nan = softmax_attention(*tensors).out.isnan()
    assert exact_is_nan.any()
    assert part.out[exact_is_nan].isnan().all()
    assert part.out[:, 0].isfinite().all()


def test_unwritten_memory_never_shows(monkeypatch):
    real = torch.empty

    def poisoned(*sizes, **options):
        return real(*sizes, **options).fill_(torch.nan if options.get("dtype", torch.float32).is_floating_point else 99)

    def empty_like(tensor, *sizes, **options):
        return poisoned(*sizes, **{"dtype": tensor.dtype, **options})

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", empty_like)
    q, k, v = make_qkv(1, 2, 149, 16)
    part = assert_same(q, k, v, grids=TWO, config=NearFarConfig((2, 3), 1, 3))
    assert part.out.isfinite().all()
