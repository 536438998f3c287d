import pytest
import torch
from attn_kernels import NearFarConfig, TokenGrid, select_tiles
from attn_kernels.near_far import selection as module
from attn_kernels.near_far.selection import drop_repeats
from attn_kernels.near_far.tiles import near_tiles
from attn_kernels.testing import make_qkv

GRIDS = (TokenGrid(3, 6, 8), TokenGrid(51, 4, 4))
CONFIG = NearFarConfig(tile=2, radius=1, top_k=4)
TILES = [(0, r, c) for r in range(3) for c in range(4)] + [(1, r, c) for r in range(2) for c in range(2)]


def members(tile):
    grid, row, column = TILES[tile]
    rows, columns = range(2 * row, 2 * row + 2), range(2 * column, 2 * column + 2)
    return [GRIDS[grid].start + r * GRIDS[grid].columns + c for r in rows for c in columns]


def is_near(a, b):
    return TILES[a][0] == TILES[b][0] and max(abs(x - y) for x, y in zip(TILES[a][1:], TILES[b][1:], strict=True)) <= 1


def brute_force(q, k, mask):
    chosen = torch.full((*q.shape[:2], len(TILES), CONFIG.top_k), -1)
    for batch in range(q.shape[0]):
        kept = [[t for t in members(tile) if mask is None or mask[batch, t]] for tile in range(len(TILES))]
        for head in range(q.shape[1]):
            for tile in range(len(TILES)):
                query = q[batch, head, kept[tile]].mean(0) if kept[tile] else torch.zeros(q.shape[-1])
                scores = {
                    other: float(query @ k[batch, head, kept[other]].mean(0))
                    for other in range(len(TILES))
                    if kept[other] and not is_near(tile, other)
                }
                best = sorted(scores, key=scores.get, reverse=True)[: CONFIG.top_k]
                chosen[batch, head, tile, : len(best)] = torch.tensor(best, dtype=torch.int64)
    return chosen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_chooses_the_best_far_tiles(masked, at_once, monkeypatch):
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", at_once)
    q, k, _ = make_qkv(2, 3, 70, 8, seed=5)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    if masked:
        mask[0, members(2)] = False
        mask[0, members(7)] = False
    found = select_tiles(q, k, grids=GRIDS, config=CONFIG, key_mask=mask)
    assert found.dtype == torch.int64
    expected = brute_force(q, k, mask)
    if masked:
        # A tile without an unmasked token has no mean query; what it chooses is not defined.
        found[0, :, [2, 7]] = expected[0, :, [2, 7]]
    assert torch.equal(found, expected)


def test_fewer_far_tiles_than_asked_leaves_minus_one():
    q, k, _ = make_qkv(1, 2, 16, 4)
    found = select_tiles(q, k, grids=[TokenGrid(0, 4, 4)], config=NearFarConfig(tile=2, radius=0, top_k=6))
    assert found.shape == (1, 2, 4, 6)
    assert (found[..., 3:] == -1).all()
    assert found[..., :3].sort(-1).values[0, 0].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_nothing_to_choose():
    q, k, _ = make_qkv(1, 2, 16, 4)
    grids = [TokenGrid(0, 4, 4)]
    assert select_tiles(q, k, grids=grids, config=NearFarConfig(tile=2, top_k=0)).shape == (1, 2, 4, 0)
    assert (select_tiles(q, k, grids=grids, config=NearFarConfig(tile=2, radius=1, top_k=3)) == -1).all()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    assert (select_tiles(q, k, grids=grids, config=NearFarConfig(2, 0, 3), key_mask=mask) == -1).all()


def test_choice_does_not_depend_on_the_size_of_the_scale():
    q, k, _ = make_qkv(1, 2, 70, 8)
    a, b = (select_tiles(q, k, grids=GRIDS, config=CONFIG, scale=scale) for scale in (0.01, 3.0))
    assert torch.equal(a, b)


def test_the_choice_has_no_gradient():
    q, k, _ = make_qkv(1, 1, 70, 8)
    assert not select_tiles(q.requires_grad_(), k, grids=GRIDS, config=CONFIG).requires_grad


def test_repeated_and_near_tiles_are_dropped():
    near = near_tiles(GRIDS, (2, 2), 1, torch.device("cpu"))
    chosen = torch.full((1, 1, len(TILES), 5), -1)
    chosen[0, 0, 0] = torch.tensor([2, 5, 2, -1, 15])
    dropped = drop_repeats(chosen, near)
    assert dropped[0, 0, 0].tolist() == [2, -1, -1, -1, 15]
    assert (dropped[0, 0, 1:] == -1).all()


def test_queries_of_some_tokens_only_are_refused():
    q, k, _ = make_qkv(1, 1, 10, 8, kv_tokens=70)
    with pytest.raises(ValueError, match="queries of all 70 tokens"):
        select_tiles(q, k, grids=GRIDS, config=CONFIG)
