from itertools import chain

import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.near_far.fused_tables import fused_tables, group_shape
from attn_kernels.near_far.tiles import tile_sizes

GRIDS = (TokenGrid(40, 7, 5), TokenGrid(3, 4, 9))
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tile", "queries", "top_k", "expected"),
    [
        ((8, 8), 64, 2, (1, 1)),
        ((8, 8), 128, 2, (1, 2)),
        ((4, 4), 64, 8, (2, 2)),
        ((4, 4), 128, 8, (2, 4)),
        ((2, 2), 64, 0, (4, 4)),
        ((1, 1), 128, 0, (4, 4)),
        ((4, 4), 128, 100, (1, 1)),
        ((16, 16), 64, 2, (1, 1)),
        ((2, 8), 64, 0, (4, 1)),
    ],
)
def test_a_group_fills_a_program_and_is_compact(tile, queries, top_k, expected):
    assert group_shape(tile, queries, top_k) == expected


def test_tables_follow_the_numbering_of_tiles():
    tables = fused_tables(GRIDS, 80, (3, 4), (1, 2), 16, CPU, 0)
    assert torch.equal(tables.tiles[:, 4] * tables.tiles[:, 5], tile_sizes(GRIDS, (3, 4), CPU).int())
    grid, row, column, first, rows, columns, width, _ = tables.tiles.T.tolist()
    assert list(zip(grid, row, column, strict=True))[:7] == [(0, r, c) for r in range(3) for c in range(2)] + [
        (1, 0, 0)
    ]
    starts = [GRIDS[g].start + 3 * r * GRIDS[g].columns + 4 * c for g, r, c in zip(grid, row, column, strict=True)]
    assert first == starts
    assert width == [GRIDS[g].columns for g in grid]
    assert (rows[5], columns[5]) == (1, 1)
    assert tables.groups.tolist()[2:5] == [
        [40, 7, 5, 2, 0, 0, 3, 2],
        [3, 4, 9, 0, 0, 6, 2, 3],
        [3, 4, 9, 0, 2, 6, 2, 3],
    ]


def test_ranges_cover_all_tokens_and_then_those_outside():
    tables = fused_tables(GRIDS, 80, (3, 4), (1, 2), 16, CPU, 0)
    covered = [list(range(start, stop)) for start, stop in tables.ranges.tolist()]
    assert max(map(len, covered)) == 16
    assert list(chain(*covered[: tables.all_ranges])) == list(range(80))
    outside = [0, 1, 2, 39, *range(75, 80)]
    assert list(chain(*covered[tables.all_ranges :])) == tables.outside.tolist() == outside


def test_a_sequence_of_image_tokens_alone():
    tables = fused_tables((TokenGrid(0, 4, 4),), 16, (2, 2), (2, 2), 16, CPU, 0)
    assert len(tables.outside) == 0
    assert len(tables.ranges) == tables.all_ranges == 1
