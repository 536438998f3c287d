"""The reference against a definition written out query by query, against exact attention, and its gradients."""

import math

import pytest
import torch
from attn_kernels import (
    NearFarConfig,
    NearFarCorrections,
    TokenGrid,
    merge_partials,
    near_far_attention,
    select_tiles,
    softmax_attention,
)
from attn_kernels.testing import assert_close, error_ratio, make_qkv

GRIDS = (TokenGrid(3, 5, 7), TokenGrid(40, 4, 4))
LENGTH = 60


def reference(*args, **kwargs):
    return near_far_attention(*args, impl="reference", **kwargs)


def tiles_of(grids, shape):
    tiles = []
    for index, grid in enumerate(grids):
        for row in range(-(-grid.rows // shape[0])):
            for column in range(-(-grid.columns // shape[1])):
                rows = range(row * shape[0], min((row + 1) * shape[0], grid.rows))
                columns = range(column * shape[1], min((column + 1) * shape[1], grid.columns))
                tokens = [grid.start + r * grid.columns + c for r in rows for c in columns]
                tiles.append((index, row, column, tokens))
    return tiles


def by_definition(q, k, v, grids, config, mask, corrections, selection):
    """Attend query by query in float64 with explicit lists of keys."""
    q, k, v = q.double(), k.double(), v.double()
    tiles, scale = tiles_of(grids, config.tile_shape), q.shape[-1] ** -0.5
    outs, lses = torch.zeros(*q.shape[:3], v.shape[-1]).double(), torch.full(q.shape[:3], -torch.inf).double()
    in_grid = {token: tile for tile, (*_, tokens) in enumerate(tiles) for token in tokens}
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        kept = [t for t in range(k.shape[2]) if mask is None or mask[b, t]]
        own = in_grid.get(i)
        scores, values = [], []
        for token in (t for t in kept if t not in in_grid):
            scores.append(scale * (q[b, h, i] @ k[b, h, token]))
            values.append(v[b, h, token])
        for index, (grid, row, column, tokens) in enumerate(tiles):
            if own is None:
                full = config.exact_queries == "exact"
            else:
                apart = max(abs(row - tiles[own][1]), abs(column - tiles[own][2]))
                full = (grid == tiles[own][0] and apart <= config.radius) or index in selection[b, h, own].tolist()
            tokens = [t for t in tokens if t in kept]
            if full:
                scores += [scale * (q[b, h, i] @ k[b, h, t]) for t in tokens]
                values += [v[b, h, t] for t in tokens]
            elif tokens:
                score = scale * (q[b, h, i] @ k[b, h, tokens].mean(0))
                if corrections is not None:
                    score = corrections.temperature[h] * score + corrections.bias[h]
                scores.append(score + math.log(len(tokens)))
                values.append(v[b, h, tokens].mean(0))
        if scores:
            lses[b, h, i] = torch.stack(scores).logsumexp(0)
            outs[b, h, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return outs, lses


@pytest.mark.parametrize("exact_queries", ["exact", "pooled"])
@pytest.mark.parametrize(("shape", "radius", "top_k"), [((2, 3), 1, 2), (3, 0, 4), ((4, 1), 1, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition(shape, radius, top_k, masked, exact_queries):
    config = NearFarConfig(shape, radius, top_k, exact_queries)
    q, k, v = make_qkv(2, 2, LENGTH, 8, value_width=6, logit_std=3.0, seed=1)
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    if masked:
        mask[1, :35] = False
    corrections = NearFarCorrections(torch.tensor([0.9, 1.2]), torch.tensor([0.3, -0.2])) if masked else None
    chosen = select_tiles(q, k, grids=GRIDS, config=config, key_mask=mask)
    part = reference(q, k, v, grids=GRIDS, config=config, key_mask=mask, corrections=corrections)
    out, lse = by_definition(q, k, v, GRIDS, config, mask, corrections, chosen)
    assert_close("out", part.out, out, 2e-6)
    assert_close("lse", part.lse, lse, 1e-6)


@pytest.mark.parametrize(
    "config",
    [
        NearFarConfig(tile=1, radius=0, top_k=0),
        NearFarConfig(tile=2, radius=0, top_k=99),
        NearFarConfig(tile=(9, 9), radius=0, top_k=1),
        NearFarConfig(tile=2, radius=3, top_k=12),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_limits(config, masked):
    q, k, v = make_qkv(2, 2, LENGTH, 8, logit_std=4.0)
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    part, exact = (
        reference(q, k, v, grids=GRIDS, config=config, key_mask=mask),
        softmax_attention(q, k, v, key_mask=mask),
    )
    assert_close("out", part.out, exact.out, 2e-6)
    assert_close("lse", part.lse, exact.lse, 1e-6)


def test_one_grid_within_the_radius_is_exact():
    q, k, v = make_qkv(1, 2, 33, 8, logit_std=4.0)
    part = reference(q, k, v, grids=[TokenGrid(0, 5, 6)], config=NearFarConfig(2, 2, 0))
    assert_close("out", part.out, softmax_attention(q, k, v).out, 2e-6)


@pytest.mark.parametrize("exact_queries", ["exact", "pooled"])
def test_constant_keys_and_values_are_exact(exact_queries):
    q, k, v = make_qkv(1, 2, LENGTH, 8, logit_std=4.0)
    for *_, tokens in tiles_of(GRIDS, (2, 2)):
        k[:, :, tokens], v[:, :, tokens] = k[:, :, tokens[:1]], v[:, :, tokens[:1]]
    mask = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3
    part = reference(q, k, v, grids=GRIDS, config=NearFarConfig(2, 0, 0, exact_queries), key_mask=mask)
    exact = softmax_attention(q, k, v, key_mask=mask)
    assert_close("out", part.out, exact.out, 2e-6)
    assert_close("lse", part.lse, exact.lse, 1e-6)


def test_the_error_falls_with_more_chosen_tiles_and_mean_of_v_is_worse():
    grid = TokenGrid(6, 24, 24)
    q, k, v = make_qkv(1, 4, grid.stop, 32, logit_std=2.0, smooth_grid=grid)
    exact = softmax_attention(q, k, v).out
    errors = [
        error_ratio(reference(q, k, v, grids=[grid], config=NearFarConfig(4, 1, top_k)).out, exact)
        for top_k in (0, 2, 4, 8)
    ]
    mean = error_ratio(v.mean(2, keepdim=True).expand_as(v), exact)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5 * mean
    assert errors[-1] < 0.2 * mean


def test_sampled_queries_are_rows_of_the_whole():
    config = NearFarConfig((2, 3), 1, 2)
    q, k, v = make_qkv(2, 2, LENGTH, 8)
    chosen = select_tiles(q, k, grids=GRIDS, config=config)
    whole = reference(q, k, v, grids=GRIDS, config=config)
    rows = torch.tensor([59, 0, 3, 17, 17, 45])
    some = near_far_attention(q[:, :, rows], k, v, grids=GRIDS, config=config, selection=chosen, query_positions=rows)
    assert_close("out", some.out, whole.out[:, :, rows], 1e-6)
    assert_close("lse", some.lse, whole.lse[:, :, rows], 1e-6)


def test_merging_with_attention_to_more_keys_is_one_softmax():
    grid = TokenGrid(0, 6, 6)
    q, k, v = make_qkv(1, 2, 36, 8, kv_tokens=50, logit_std=3.0)
    image = reference(q, k[:, :, :36], v[:, :, :36], grids=[grid], config=NearFarConfig(2, 0, 99))
    merged = merge_partials(image, softmax_attention(q, k[:, :, 36:], v[:, :, 36:]))
    exact = softmax_attention(q, k, v)
    assert_close("out", merged.out, exact.out, 2e-6)
    assert_close("lse", merged.lse, exact.lse, 1e-6)


def test_gradients_of_everything():
    config = NearFarConfig(2, 0, 1)
    grid = TokenGrid(1, 4, 3)
    tensors = [x.double().requires_grad_() for x in make_qkv(1, 2, 14, 3, logit_std=1.0)]
    corrections = [torch.tensor(x, dtype=torch.double, requires_grad=True) for x in ([0.8, 1.1], [0.2, -0.4])]
    rows = torch.tensor([0, 5, 9, 13])
    chosen = select_tiles(*tensors[:2], grids=[grid], config=config)
    mask = torch.tensor([[True] * 6 + [False] + [True] * 7])

    def run(q, k, v, temperature, bias):
        return near_far_attention(
            q[:, :, rows],
            k,
            v,
            grids=[grid],
            config=config,
            key_mask=mask,
            corrections=NearFarCorrections(temperature, bias),
            selection=chosen,
            query_positions=rows,
        )

    assert torch.autograd.gradcheck(run, (*tensors, *corrections))
    grads = torch.autograd.grad(run(*tensors, *corrections).out.square().sum(), corrections)
    assert all((grad.abs() > 1e-6).all() for grad in grads)


def test_corrections_move_only_pooled_scores():
    q, k, v = make_qkv(1, 2, LENGTH, 8)
    off = NearFarCorrections(torch.ones(2), torch.full((2,), -1e4))
    config = NearFarConfig(2, 1, 0)
    part = reference(q, k, v, grids=GRIDS, config=config, corrections=off)
    tiles = tiles_of(GRIDS, (2, 2))
    near = {t for grid, row, column, tokens in tiles if grid == 0 and row <= 1 and column <= 1 for t in tokens}
    keys = [t for t in range(LENGTH) if t in near or not any(t in tokens for *_, tokens in tiles)]
    expected = softmax_attention(q[:, :, 3:4], k[:, :, keys], v[:, :, keys])
    assert_close("out", part.out[:, :, 3:4], expected.out, 2e-6)
    assert_close("text", part.out[:, :, :3], softmax_attention(q[:, :, :3], k, v).out, 2e-6)
    same = NearFarCorrections(torch.ones(2), torch.zeros(2))
    assert_close(
        "identity",
        reference(q, k, v, grids=GRIDS, config=config, corrections=same).out,
        reference(q, k, v, grids=GRIDS, config=config).out,
        1e-7,
    )
