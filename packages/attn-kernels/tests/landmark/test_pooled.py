import pytest
import torch
from attn_kernels import TokenGrid, merge_partials, softmax_attention
from attn_kernels.landmark import landmark_attention, pooled_landmark_attention, pooled_landmarks
from attn_kernels.testing import assert_close, error_ratio, make_qkv

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(40, 4, 6)]
LENGTH = 66


def tile_of(grid, token, tile):
    row, column = divmod(token - grid.start, grid.columns)
    return row // tile[0], column // tile[1]


def oracle(q, k, v, tile, chosen=(), mask=None):
    """Walk through the tokens one by one, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    outs, lses = [], []
    for row in range(q.shape[0]):
        kept = [n for n in range(LENGTH) if mask is None or mask[row, n]]
        groups = {}
        for n in kept:
            grid = next((g for g, each in enumerate(GRIDS) if each.start <= n < each.stop), None)
            alone = grid is None or n in chosen
            groups.setdefault(("token", n) if alone else (grid, *tile_of(GRIDS[grid], n, tile)), []).append(n)
        keys = torch.stack([k[row][:, members].mean(1) for members in groups.values()], 1)
        values = torch.stack([v[row][:, members].mean(1) for members in groups.values()], 1)
        counts = torch.tensor([len(members) for members in groups.values()]).double()
        scores = q[row] @ keys.mT * q.shape[-1] ** -0.5 + counts.log()
        outs.append(scores.softmax(-1) @ values)
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def inputs(dtype=torch.float32):
    return make_qkv(2, 2, LENGTH, 16, value_width=10, dtype=dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chosen", [(), (4, 11, 12, 50, 1)])
@pytest.mark.parametrize(
    ("impl", "dtype", "ratio"),
    [
        ("reference", torch.float32, 2e-6),
        ("reference", torch.bfloat16, 5e-3),
        ("blocked", torch.float32, 2e-6),
        ("blocked", torch.bfloat16, 5e-3),
        ("fused", torch.float32, 2e-6),
        ("fused", torch.bfloat16, 1e-2),
        ("fused", torch.float16, 2e-3),
    ],
)
def test_is_one_softmax_over_tokens_and_tiles(impl, dtype, ratio, chosen, masked):
    q, k, v = inputs(dtype)
    mask = None
    if masked:
        mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[0, 40:46] = False
        expected = oracle(q, k, v, (2, 3), chosen, mask)
        k[0, :, ~mask[0]], v[1, :, ~mask[1]] = torch.nan, torch.inf
    else:
        expected = oracle(q, k, v, (2, 3), chosen)
    index = torch.tensor(chosen) if chosen else None
    part = pooled_landmark_attention(q, k, v, grids=GRIDS, tile=(2, 3), index=index, key_mask=mask, impl=impl)
    assert part.out.dtype == dtype
    assert_close("out", part.out, expected[0], ratio)
    assert_close("lse", part.lse, expected[1], max(1e-5, ratio / 2))


def test_tiles_of_one_token_are_exact_and_large_ones_are_not():
    q, k, v = inputs()
    exact = softmax_attention(q, k, v)
    part = pooled_landmark_attention(q, k, v, grids=GRIDS, tile=1)
    assert_close("out", part.out, exact.out, 1e-6)
    assert error_ratio(pooled_landmark_attention(q, k, v, grids=GRIDS, tile=2).out, exact.out) > 0.1


def test_equal_keys_and_values_of_a_tile_are_exact():
    q, k, v = inputs()
    k, v = k.clone(), v.clone()
    for grid in GRIDS:
        k[:, :, grid.start : grid.stop] = k[:, :, grid.start : grid.start + 1]
        v[:, :, grid.start : grid.stop] = v[:, :, grid.start : grid.start + 1]
    part = pooled_landmark_attention(q, k, v, grids=GRIDS, tile=(3, 4))
    exact = softmax_attention(q, k, v)
    assert_close("out", part.out, exact.out, 1e-5)
    assert_close("lse", part.lse, exact.lse, 1e-6)


def test_pooled_means_and_counts():
    _, k, v = inputs()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 40:] = False
    k[0, :, 40:] = torch.nan
    tiles = pooled_landmarks(k, v, grids=GRIDS, tile=(5, 7), key_mask=mask)
    assert tiles.k.shape == (2, 2, 2, 16)
    assert tiles.v.shape == (2, 2, 2, 10)
    assert_close("mean", tiles.k[:, :, 0], k[:, :, 3:38].mean(2), 1e-6)
    assert (tiles.k[0, :, 1] == 0).all()
    assert tiles.log_count.exp().round().tolist() == [[35, 0], [35, 24]]


def test_a_row_without_keys():
    q, k, v = inputs()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0] = False
    for impl in ("reference", "blocked", "fused"):
        part = pooled_landmark_attention(q, k, v, grids=GRIDS, key_mask=mask, impl=impl)
        assert (part.out[0] == 0).all()
        assert (part.lse[0] == -torch.inf).all()
        assert part.lse[1].isfinite().all()


def test_shares_one_denominator_with_other_keys():
    q, k, v = inputs()
    extra = make_qkv(2, 2, LENGTH, 16, value_width=10, seed=5)
    merged = merge_partials(
        pooled_landmark_attention(q, k, v, grids=GRIDS, tile=1), softmax_attention(q, extra[1], extra[2])
    )
    exact = softmax_attention(q, torch.cat([k, extra[1]], 2), torch.cat([v, extra[2]], 2))
    assert_close("out", merged.out, exact.out, 1e-6)


def test_every_token_chosen_equals_landmarks_and_gradients_flow():
    q, k, v = (x[:, :, :, :6].double().requires_grad_() for x in inputs())
    index = torch.arange(LENGTH)
    part = pooled_landmark_attention(q, k, v, grids=GRIDS, index=index)
    assert_close("out", part.out.detach(), landmark_attention(q, k, v, index).out.detach(), 1e-12)
    grads = torch.autograd.grad(pooled_landmark_attention(q, k, v, grids=GRIDS, chunk=7).out.square().sum(), (q, k, v))
    # The gradient of a mean reaches every member of the tile.
    assert all((grad != 0).all() for grad in grads)


def test_wrong_arguments_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="tile must be at least 1"):
        pooled_landmark_attention(q, k, v, grids=GRIDS, tile=0)
    with pytest.raises(ValueError, match="index must be int64"):
        pooled_landmark_attention(q, k, v, grids=GRIDS, index=torch.zeros(2))
    with pytest.raises(ValueError, match="must end by 66 tokens"):
        pooled_landmark_attention(q, k, v, grids=[TokenGrid(60, 4, 4)])
    with pytest.raises(ValueError, match="requires one"):
        pooled_landmark_attention(q.requires_grad_(), k, v, grids=GRIDS, impl="blocked")
