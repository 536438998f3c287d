import pytest
from attn_kernels import TokenGrid


def test_a_grid_counts_its_tokens():
    grid = TokenGrid(5, 3, 4)
    assert (grid.tokens, grid.stop) == (12, 17)
    assert grid == TokenGrid(5, 3, 4)


@pytest.mark.parametrize("wrong", [(-1, 2, 2), (0, 0, 2), (0, 2, 0)])
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(ValueError, match="at least one row and column"):
        TokenGrid(*wrong)
