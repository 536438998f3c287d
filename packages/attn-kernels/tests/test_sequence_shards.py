"""How rows are dealt out, and what that costs."""

import pytest
import torch
from attn_kernels import NearFarConfig, TokenGrid
from attn_kernels.sequence_shards import Shards, received_bytes, tile_tokens

FLUX = {"batch": 1, "heads": 24, "width": 128, "value_width": 128, "itemsize": 2}


def test_every_token_of_the_image_is_on_one_rank() -> None:
    shards = Shards.even(TokenGrid(3, 27, 5), NearFarConfig(4, 1, 0), 3)
    x = torch.arange(float(shards.grid.stop)).view(1, 1, -1, 1)
    parts = [shards.local(x, rank) for rank in range(3)]
    assert all(torch.equal(part[:, :, :3], x[:, :, :3]) for part in parts)
    assert torch.equal(torch.cat([part[:, :, 3:] for part in parts], dim=2), x[:, :, 3:])
    assert [first % 4 for first in shards.bounds[:-1]] == [0, 0, 0]


def test_tiles_of_ranks_follow_each_other() -> None:
    shards = Shards.even(TokenGrid(0, 27, 5), NearFarConfig(4, 1, 0), 3)
    assert [shards.tiles(rank) for rank in range(3)] == [(0, 4), (4, 8), (8, 14)]
    assert [shards.seen(rank) for rank in range(3)] == [(0, 6), (2, 10), (6, 14)]


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="4 rows of tiles on 3 ranks leave fewer than 2"):
        Shards.even(TokenGrid(0, 16, 16), NearFarConfig(4, 2, 0), 3)


def test_without_chosen_tiles_little_travels() -> None:
    grid = TokenGrid(512, 512, 512)
    ring = received_bytes(Shards.even(grid, NearFarConfig(8, 1, 2), 8), 3, **FLUX)
    near = received_bytes(Shards.even(grid, NearFarConfig(8, 1, 0), 8), 3, **FLUX)
    assert near.ring == 0
    assert ring.ring == 7 * 512 * 512 // 8 * 24 * 256 * 2
    assert ring.total > 10 * near.total


def test_tokens_of_ragged_tiles() -> None:
    grid, config = TokenGrid(9, 5, 7), NearFarConfig((2, 3), 1, 0)
    found = tile_tokens(grid, config, torch.device("cpu"))
    assert found.tokens.shape == (9, 6)
    assert found.inside.sum() == 35
    assert torch.equal(found.tokens[found.inside].sort().values, torch.arange(35))
    assert torch.equal(found.tokens.flatten()[found.place], torch.arange(35))
    assert torch.equal(found.tile_of, found.place // 6)
