"""Masks against a loop over pairs, blocks against masks."""

import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.window import window_blocks, window_blocks_2d, window_mask, window_mask_2d
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 45), st.integers(0, 45), st.integers(1, 20))
def test_mask_is_the_union_of_the_windows_of_a_chunk_and_the_prefix(queries, keys, window, prefix, chunk):
    mask = window_mask(queries, keys, window=window, prefix=prefix, chunk=chunk)
    for i in range(queries):
        mates = [m for m in range(queries) if m // chunk == i // chunk]
        for j in range(keys):
            assert mask[i, j] == (j < prefix or any(abs(m - j) <= window for m in mates))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 45), st.integers(0, 45), st.integers(1, 20),
    st.integers(1, 50),
)  # fmt: skip
def test_blocks_hold_the_pairs_of_the_mask_and_no_others(queries, keys, window, prefix, chunk, block):
    options = {"window": window, "prefix": prefix, "chunk": chunk}
    assert_covers(window_blocks(queries, keys, block=block, **options), window_mask(queries, keys, **options))


@st.composite
def scenes(draw):
    grids, start = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 3))):
        grids.append(TokenGrid(start, draw(st.integers(1, 7)), draw(st.integers(1, 7))))
        start = grids[-1].stop + draw(st.integers(0, 2))
    return {
        "length": start + draw(st.integers(0, 3)),
        "grids": draw(st.permutations(grids)),
        "radius": draw(st.tuples(st.integers(0, 8), st.integers(0, 8))),
        "exact_queries": draw(st.sampled_from(["exact", "local"])),
    }


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_mask_2d_is_what_its_docstring_says(scene):
    length, radius = scene["length"], scene["radius"]
    places = {
        grid.start + row * grid.columns + column: (number, row, column)
        for number, grid in enumerate(scene["grids"])
        for row in range(grid.rows)
        for column in range(grid.columns)
    }
    mask = window_mask_2d(**scene)
    for i in range(length):
        for j in range(length):
            if j not in places:
                expected = True
            elif i not in places:
                expected = scene["exact_queries"] == "exact"
            else:
                (mine, row, column), (other, r, c) = places[i], places[j]
                expected = mine == other and abs(row - r) <= radius[0] and abs(column - c) <= radius[1]
            assert mask[i, j] == expected


@settings(max_examples=80, deadline=None)
@given(scenes(), st.integers(1, 9))
def test_blocks_2d_hold_the_pairs_of_the_mask_and_no_others(scene, block):
    assert_covers(window_blocks_2d(block=block, **scene), window_mask_2d(**scene))


def assert_covers(blocks, mask):
    count = torch.zeros_like(mask, dtype=torch.int64)
    answered = torch.zeros(len(mask), dtype=torch.int64)
    for block in blocks:
        assert len(block.keys.unique()) == len(block.keys)
        answered[block.queries] += 1
        keep = torch.ones(len(block.queries), len(block.keys)) if block.keep is None else block.keep
        count[block.queries[:, None], block.keys] += keep.long()
    assert torch.equal(count, mask.long())
    assert (answered == 1).all()


def test_sampled_rows_are_rows_of_the_mask():
    rows = torch.tensor([0, 17, 5, 39])
    whole = window_mask(40, 40, window=3, prefix=2, chunk=4)
    assert torch.equal(window_mask(40, 40, window=3, prefix=2, chunk=4, query_positions=rows), whole[rows])
    grids = [TokenGrid(4, 6, 6)]
    whole = window_mask_2d(40, grids=grids, radius=1)
    assert torch.equal(window_mask_2d(40, grids=grids, radius=1, query_positions=rows), whole[rows])


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="window >= 0"):
        window_mask(4, 4, window=-1)
    with pytest.raises(ValueError, match="chunk >= 1"):
        list(window_blocks(4, 4, window=1, chunk=0))
    with pytest.raises(ValueError, match="block must be at least 1"):
        list(window_blocks(4, 4, window=1, block=0))
    with pytest.raises(ValueError, match="at least one TokenGrid"):
        window_mask_2d(4, grids=[], radius=1)
    with pytest.raises(ValueError, match="radius must be"):
        window_mask_2d(4, grids=[TokenGrid(0, 2, 2)], radius=(1, -1))
    with pytest.raises(ValueError, match="exact_queries"):
        window_mask_2d(4, grids=[TokenGrid(0, 2, 2)], radius=1, exact_queries="pooled")
    with pytest.raises(ValueError, match="must end by 3 tokens"):
        window_mask_2d(3, grids=[TokenGrid(0, 2, 2)], radius=1)
