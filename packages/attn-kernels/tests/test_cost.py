import pytest
from attn_kernels import NearFarConfig, TokenGrid
from attn_kernels.cost import exact_flops, kernel_regression_flops, near_far_flops


def test_exact_attention_is_two_matrix_products():
    assert exact_flops(2, 3, 5, 7, 11, 13) == 2 * 3 * (2 * 5 * 7 * 11 + 2 * 5 * 7 * 13)


def test_near_far_at_two_thousand_pixels_matches_the_arithmetic():
    # 512 text tokens and 128 x 128 image tokens: 512 + 9 tiles of 16 + 1,015 pooled tiles, less at the edges.
    shape = (1, 24, 16896, 128, 128)
    config = NearFarConfig(tile=4, top_k=0, exact_queries="pooled")
    flops = near_far_flops(*shape, grids=[TokenGrid(512, 128, 128)], config=config)
    keys = flops / exact_flops(1, 24, 16896, 1, 128, 128)
    assert keys == pytest.approx(512 + 144 + 1015, rel=0.01)


def test_near_far_that_covers_the_grid_costs_exact_attention():
    config = NearFarConfig(tile=4, radius=9, top_k=0)
    flops = near_far_flops(1, 2, 110, 8, 8, grids=[TokenGrid(10, 10, 10)], config=config)
    assert flops == exact_flops(1, 2, 110, 110, 8, 8)


def test_kernel_regression_counts_state_read_out_and_map():
    # State F x (Dv + 1) per key, read-out the same per query, the map for both.
    assert kernel_regression_flops(1, 2, 3, 5, 7, 11) == 2 * (3 + 5) * 2 * 7 * 12
    assert kernel_regression_flops(1, 2, 3, 5, 7, 11, map_flops=100) == 2 * 8 * (2 * 7 * 12 + 100)
