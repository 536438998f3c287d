import pytest
import torch
from attn_kernels import NearFarConfig, TokenGrid, near_far_keys
from attn_kernels.near_far.tiles import check_grids, exact_ranges, near_tiles, pool_tiles, tile_sizes, tile_total
from attn_kernels.testing import assert_close

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wrong", [{"tile": 0}, {"tile": (2, 0)}, {"radius": -1}, {"top_k": -1}, {"exact_queries": "none"}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"near-far needs|exact_queries must be"):
        NearFarConfig(**wrong)


def test_grids_must_exist_fit_and_not_overlap():
    assert check_grids([TokenGrid(4, 2, 2), TokenGrid(0, 2, 2)], 8) == (TokenGrid(4, 2, 2), TokenGrid(0, 2, 2))
    for grids, message in (
        ([], "at least one TokenGrid"),
        ([TokenGrid(5, 2, 2)], "end by 8 tokens"),
        ([TokenGrid(0, 2, 2), TokenGrid(3, 2, 2)], "must not overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            check_grids(grids, 8)


def test_tokens_outside_the_grids():
    assert exact_ranges([TokenGrid(9, 1, 2), TokenGrid(2, 2, 2)], 14) == ((0, 2), (6, 9), (11, 14))
    assert exact_ranges([TokenGrid(0, 2, 2)], 4) == ()


def test_ragged_tiles_hold_what_is_left():
    grids = (TokenGrid(0, 5, 7), TokenGrid(40, 2, 3))
    assert tile_total(grids, (2, 3)) == 9 + 1
    assert tile_sizes(grids, (2, 3), CPU).tolist() == [6, 6, 2, 6, 6, 2, 3, 3, 1, 6]


def test_near_tiles_are_those_within_the_radius_on_the_same_grid():
    grids = (TokenGrid(0, 7, 9), TokenGrid(70, 4, 3), TokenGrid(90, 1, 1))
    for radius in (0, 1, 2, 9):
        places = [
            (index, row, column)
            for index, (rows, columns) in enumerate(((4, 3), (2, 1), (1, 1)))
            for row in range(rows)
            for column in range(columns)
        ]
        for tile, listed in enumerate(near_tiles(grids, (2, 3), radius, CPU).tolist()):
            expected = {
                other
                for other, (grid, row, column) in enumerate(places)
                if grid == places[tile][0] and max(abs(row - places[tile][1]), abs(column - places[tile][2])) <= radius
            }
            real = [other for other in listed if other < len(places)]
            assert len(real) == len(set(real))
            assert set(real) == expected


@pytest.mark.parametrize("masked", [False, True])
def test_means_are_over_the_unmasked_tokens_of_a_tile(masked):
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(2, 5, 7)
    x = torch.randn(2, 3, 40, 4, generator=generator)
    mask = torch.rand(2, 40, generator=generator) > 0.5
    mask[0, [2 + row * 7 + column for row in range(2) for column in range(3)]] = False
    (means,), counts = pool_tiles([x], [grid], (2, 3), mask if masked else None)
    for batch in range(2):
        for tile in range(9):
            top, left = 2 * (tile // 3), 3 * (tile % 3)
            members = [2 + r * 7 + c for r in range(top, min(top + 2, 5)) for c in range(left, min(left + 3, 7))]
            if masked:
                members = [index for index in members if mask[batch, index]]
            assert counts[batch if masked else 0, tile] == len(members)
            expected = x[batch][:, members].mean(1) if members else torch.zeros(3, 4)
            assert_close("mean", means[batch, :, tile], expected, 1e-6)


def test_masked_tokens_that_are_not_finite_leave_the_means():
    x = torch.ones(1, 1, 4, 2)
    x[0, 0, 1] = torch.nan
    (means,), counts = pool_tiles([x], [TokenGrid(0, 2, 2)], (2, 2), torch.tensor([[True, False, True, True]]))
    assert means.flatten().tolist() == [1.0, 1.0]
    assert counts.item() == 3


@pytest.mark.parametrize(
    ("grid", "length", "config", "keys"),
    [
        (TokenGrid(0, 8, 8), 64, NearFarConfig(tile=2, radius=0, top_k=0), 4 + 15),
        (TokenGrid(0, 8, 8), 64, NearFarConfig(tile=2, radius=0, top_k=3), 4 + 3 * 4 + 12),
        (TokenGrid(0, 8, 8), 64, NearFarConfig(tile=2, radius=0, top_k=99), 64),
        (TokenGrid(0, 8, 8), 64, NearFarConfig(tile=8), 64),
        (TokenGrid(0, 5, 7), 35, NearFarConfig(tile=1), 35),
        (TokenGrid(6, 8, 8), 70, NearFarConfig(tile=2, radius=0, top_k=0), (6 * 70 + 64 * (6 + 4 + 15)) / 70),
        (TokenGrid(6, 8, 8), 70, NearFarConfig(2, 0, 0, "pooled"), (6 * (6 + 16) + 64 * (6 + 4 + 15)) / 70),
    ],
)
def test_mean_number_of_keys(grid, length, config, keys):
    assert near_far_keys([grid], length, config) == pytest.approx(keys)


def test_mean_number_of_keys_of_ragged_grids_is_counted_over_tokens():
    grids, length, shape, radius = (TokenGrid(3, 5, 7), TokenGrid(40, 4, 4)), 60, (2, 3), 1
    near, sizes = near_tiles(grids, shape, radius, CPU), tile_sizes(grids, shape, CPU).tolist()
    outside = length - 35 - 16
    total = outside * length
    for tile, listed in enumerate(near.tolist()):
        real = [other for other in listed if other < len(sizes)]
        total += sizes[tile] * (outside + sum(sizes[other] for other in real) + len(sizes) - len(real))
    found = near_far_keys(grids, length, NearFarConfig(tile=shape, radius=radius, top_k=0))
    assert found == pytest.approx(total / length)
