import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.testing import assert_close, make_qkv


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("grid", [None, TokenGrid(5, 16, 20)])
def test_scores_have_the_spread_that_was_asked_for(spread, grid):
    q, k, _ = make_qkv(2, 4, 325, 32, logit_std=spread, smooth_grid=grid)
    scores = q @ k.mT / 32**0.5
    assert scores.std().item() == pytest.approx(spread, rel=0.1)


def test_shapes_dtype_and_seed():
    q, k, v = make_qkv(2, 3, 5, 8, kv_tokens=7, value_width=4, dtype=torch.bfloat16, seed=1)
    assert (q.shape, k.shape, v.shape) == ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    again = make_qkv(2, 3, 5, 8, kv_tokens=7, value_width=4, dtype=torch.bfloat16, seed=1)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    assert not torch.equal(q, make_qkv(2, 3, 5, 8, dtype=torch.bfloat16, seed=2)[0])


def test_smooth_means_that_neighbours_agree():
    grid = TokenGrid(3, 16, 16)
    for tensor in make_qkv(1, 2, 259, 16, logit_std=1.0, smooth_grid=grid):
        image = tensor[:, :, 3:].reshape(1, 2, 16, 16, 16)
        far = (image - image.roll(8, 2)).square().mean()
        assert (image[:, :, 1:] - image[:, :, :-1]).square().mean() < 0.5 * far
        assert (image[:, :, :, 1:] - image[:, :, :, :-1]).square().mean() < 0.5 * far


def test_a_smooth_grid_must_fit():
    with pytest.raises(ValueError, match="smooth_grid"):
        make_qkv(1, 1, 10, 4, smooth_grid=TokenGrid(0, 4, 4))


def test_assert_close():
    expected = torch.tensor([1.0, -torch.inf, 2.0])
    assert_close("same", expected.clone(), expected, 0.0)
    with pytest.raises(AssertionError, match="x: relative error"):
        assert_close("x", torch.tensor([1.1, -torch.inf, 2.0]), expected, 1e-3)
    for wrong in ([torch.nan, -torch.inf, 2.0], [1.0, 0.0, 2.0], [1.0, torch.inf, 2.0], [1.0, -torch.inf, torch.inf]):
        with pytest.raises(AssertionError):
            assert_close("x", torch.tensor(wrong), expected, 1e-3)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", torch.ones(2), torch.ones(1), 1.0)
