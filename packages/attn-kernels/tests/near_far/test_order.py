import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.near_far.order import from_tiles, to_tiles

GRIDS = (TokenGrid(20, 3, 3), TokenGrid(2, 4, 4))


def test_tiles_hold_their_tokens_in_raster_order_and_zeros_elsewhere():
    x = torch.arange(1.0, 31.0).view(1, 30, 1)
    tiles = torch.full((1, 8, 4, 1), torch.nan)
    to_tiles(x, GRIDS, (2, 2), tiles)
    first = x[0, 20:29, 0].view(3, 3)
    assert tiles[0, 0, :, 0].tolist() == first[:2, :2].flatten().tolist()
    assert tiles[0, 1, :, 0].tolist() == [first[0, 2].item(), 0.0, first[1, 2].item(), 0.0]
    assert tiles[0, 3, :, 0].tolist() == [first[2, 2].item(), 0.0, 0.0, 0.0]
    second = x[0, 2:18, 0].view(4, 4)
    assert tiles[0, 5, :, 0].tolist() == second[:2, 2:].flatten().tolist()


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 3), (4, 1), (5, 9)])
def test_there_and_back_writes_the_grids_and_nothing_else(shape):
    x = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(0))
    count = sum(-(-g.rows // shape[0]) * -(-g.columns // shape[1]) for g in GRIDS)
    tiles = torch.empty(3, count, shape[0] * shape[1], 5)
    to_tiles(x.transpose(0, 1).contiguous().transpose(0, 1), GRIDS, shape, tiles)
    back = torch.full_like(x, -7.0)
    from_tiles(tiles, GRIDS, shape, back)
    inside = torch.zeros(30, dtype=torch.bool)
    inside[2:18] = inside[20:29] = True
    assert torch.equal(back[:, inside], x[:, inside])
    assert (back[:, ~inside] == -7.0).all()
