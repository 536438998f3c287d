from math import isqrt

import pytest
import torch
from attn_kernels import NearFarConfig, TokenGrid
from attn_kernels.cost import (
    AttentionShape,
    Estimate,
    attend_work,
    break_even_tokens,
    exact_flops,
    exact_work,
    hybrid_work,
    kernel_regression_flops,
    kernel_regression_work,
    near_far_flops,
    near_far_work,
    pays_off,
    taylor_flops,
    taylor_work,
    window_keys,
    window_keys_2d,
)
from attn_kernels.device_model import Work, cpu_model, gpu_model


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


def square(tokens: int, heads: int = 24, width: int = 128) -> AttentionShape:
    return AttentionShape(1, heads, tokens, tokens, width, width)


def test_shape_is_read_from_the_tensors():
    q, k, v = torch.empty(2, 3, 5, 7), torch.empty(2, 3, 11, 7), torch.empty(2, 3, 11, 13)
    shape = AttentionShape.of(q, k, v)
    assert shape == AttentionShape(2, 3, 5, 11, 7, 13)
    assert shape.values == q.numel() + k.numel() + v.numel() + 2 * 3 * 5 * 13


def test_taylor_counts_the_true_features():
    # 153 monomials of degree up to 2 in 16 variables, 6,545 of degree up to 3 in 32.
    assert taylor_flops(1, 2, 3, 5, 16, 11, terms=3) == 2 * 8 * 153 * 2 * 12
    assert taylor_flops(1, 1, 1, 0, 128, 128, terms=4, blocks=4) == 4 * 6545 * 2 * 33


@pytest.mark.parametrize(("length", "window", "prefix"), [(1, 0, 0), (17, 3, 0), (17, 16, 5), (40, 7, 11), (40, 50, 3)])
def test_window_keys_are_those_of_a_count(length, window, prefix):
    pairs = sum(abs(i - j) <= window or j < prefix for i in range(length) for j in range(length))
    assert window_keys(length, window, prefix) == pytest.approx(pairs / length)


def test_window_keys_in_two_dimensions_are_those_of_a_count():
    grids, radius, length = [TokenGrid(3, 5, 7), TokenGrid(38, 4, 4)], (1, 3), 60
    places = {}
    for grid in grids:
        for place in range(grid.tokens):
            places[grid.start + place] = (grid, *divmod(place, grid.columns))

    def sees(i: int, j: int) -> bool:
        if i not in places or j not in places:
            return True
        (one, r, c), (other, y, x) = places[i], places[j]
        return one == other and abs(r - y) <= radius[0] and abs(c - x) <= radius[1]

    pairs = sum(sees(i, j) for i in range(length) for j in range(length))
    assert window_keys_2d(length, grids, radius) == pytest.approx(pairs / length)
    assert window_keys_2d(length, [TokenGrid(3, 5, 7)], 9) == length


def test_choosing_tiles_costs():
    shape, grids = square(1036), [TokenGrid(12, 32, 32)]
    plain = near_far_work(shape, grids=grids, config=NearFarConfig(4, 1, 0))
    chosen = near_far_work(shape, grids=grids, config=NearFarConfig(4, 1, 8))
    assert chosen.flops > plain.flops
    # 64 tiles score each other.
    assert chosen.products == 24 * 64**2
    assert chosen.launches > plain.launches


def test_a_feature_map_costs_its_layers_and_saves_the_features():
    shape = square(100, heads=2, width=8)
    bare = kernel_regression_work(shape, features=32)
    mapped = kernel_regression_work(shape, features=32, layers=(16,))
    assert mapped.flops - bare.flops == 2 * 200 * 2 * (8 * 16 + 16 * 32)
    assert mapped.exponentials == 2 * 200 * (16 + 32)
    assert bare.values - mapped.values == 2 * 200 * (32 - 8)


def test_hybrid_is_more_than_its_parts():
    shape = square(1000)
    work = hybrid_work(shape, near_keys=100.0, rank=16, terms=3)
    near = attend_work("window", shape, 100.0)
    far = taylor_work(AttentionShape(1, 24, 1000, 1000, 16, 128), terms=3)
    assert work.flops > near.flops + far.flops
    assert work.exponentials == near.exponentials
    fused = hybrid_work(shape, near_keys=100.0, rank=16, terms=3, fused=True)
    # Queries and keys once more, and sums in float32 to memory and back instead of an answer.
    assert fused.values - work.values == 24 * 1000 * (2 * 128 + 3 * 128)
    assert (fused.flops, fused.products) == (work.flops, work.products)
    assert fused.launches > work.launches


def test_more_terms_features_keys_and_blocks_cost_as_they_should():
    model, dtype = gpu_model("sm90"), torch.bfloat16
    shape = square(16_896)
    seconds = [model.seconds(taylor_work(shape, terms=terms, blocks=8), dtype) for terms in (2, 3, 4, 5)]
    assert seconds == sorted(seconds)
    narrow, wide = (model.seconds(taylor_work(shape, terms=4, blocks=blocks), dtype) for blocks in (8, 4))
    assert wide > 3 * narrow


@pytest.mark.parametrize(
    ("work", "least", "most"),
    [
        (lambda shape: taylor_work(shape, terms=3, blocks=8), 500, 2_500),
        (lambda shape: taylor_work(shape, terms=4, blocks=8), 2_000, 4_500),
        (lambda shape: taylor_work(shape, terms=4, blocks=4), 10_000, 25_000),
        (lambda shape: kernel_regression_work(shape, features=256, layers=(512, 512)), 4_000, 9_000),
        (lambda shape: attend_work("landmark", shape, 512 + 0.05 * shape.keys), 64, 1_000),
    ],
)
def test_modelled_break_even_on_an_h100_is_that_of_the_hand_calculation(work, least, most):
    found = break_even_tokens(lambda n: (square(n), work(square(n))), dtype=torch.bfloat16, device=gpu_model("sm90"))
    assert least <= found <= most


def test_break_even_is_where_the_estimates_cross():
    at = lambda n: (square(n), taylor_work(square(n), terms=4, blocks=8))  # noqa: E731
    settings = {"dtype": torch.bfloat16, "device": gpu_model("sm90")}
    found = break_even_tokens(at, **settings)

    def estimate(tokens: int) -> Estimate:
        shape, work = at(tokens)
        return pays_off(work, shape, **settings)

    assert not estimate(found - 1)
    assert estimate(found)
    assert estimate(2 * found).speed_up == pytest.approx(2.0, rel=0.15)
    assert "not measured" in estimate(found).source


def test_break_even_at_the_ends_of_the_range():
    settings = {"dtype": torch.float32, "device": cpu_model()}
    never = lambda n: (square(n), exact_work(square(n))._replace(operator="other"))  # noqa: E731
    always = lambda n: (square(n), attend_work("exact", square(n), 1))  # noqa: E731
    assert break_even_tokens(never, **settings, most=10_000) is None
    assert break_even_tokens(always, **settings, least=100) == 100
    with pytest.raises(ValueError, match="least < most"):
        break_even_tokens(always, **settings, least=9, most=9)


def test_near_far_gathers_near_and_chosen_tiles_for_every_tile():
    shape = square(12 + 24 * 24, heads=2, width=8)
    grids = [TokenGrid(12, 24, 24)]
    plain, chosen, wide = (
        near_far_work(shape, grids=grids, config=NearFarConfig(8, radius, top_k)).copied
        for radius, top_k in ((1, 0), (1, 2), (2, 0))
    )
    # 9 tiles of 64 tokens, each with a key and a value of 8 numbers in two heads.
    assert chosen - plain == 2 * 9 * 2 * 64 * (8 + 8)
    # The grid has no more than 3 x 3 tiles to be near.
    assert plain == wide
    assert plain > 2 * 9 * 9 * 64 * (8 + 8)


# Seconds on one thread of an AMD EPYC (Zen 4), torch 2.15, float32: four heads of 128 and 12 tokens of text.
@pytest.mark.parametrize(
    ("tile", "top_k", "side", "seconds"),
    [
        (4, 0, 32, 0.0202),
        (4, 0, 48, 0.0495),
        (4, 8, 32, 0.0308),
        (4, 8, 48, 0.0712),
        (4, 8, 128, 1.070),
        (8, 0, 32, 0.0323),
        (8, 0, 48, 0.0693),
        (8, 2, 32, 0.0391),
        (8, 2, 48, 0.0834),
        (8, 2, 128, 0.669),
    ],
)
def test_near_far_takes_at_least_what_was_measured(tile, top_k, side, seconds):
    shape = square(12 + side * side, heads=4)
    work = near_far_work(shape, grids=[TokenGrid(12, side, side)], config=NearFarConfig(tile, 1, top_k))
    assert 1.0 <= cpu_model(1).seconds(work, torch.float32) / seconds <= 1.3


# Where the measured times of the same machine crossed, by straight lines between logarithms.
@pytest.mark.parametrize(
    ("tile", "top_k", "measured"), [(4, 0, 772), (4, 8, 1200), (8, 0, 1238), (8, 2, 1484)], ids=str
)
def test_near_far_break_even_is_not_foretold_too_early(tile, top_k, measured):
    def pays(side: int) -> bool:
        shape = square(12 + side * side, heads=4)
        work = near_far_work(shape, grids=[TokenGrid(12, side, side)], config=NearFarConfig(tile, 1, top_k))
        return bool(pays_off(work, shape, dtype=torch.float32, device=cpu_model(1)))

    first = next(side for side in range(8, 128) if pays(side))
    assert measured <= 12 + first * first <= 1.35 * measured


def test_what_only_torch_copies_costs_nothing_on_a_gpu():
    shape, model = square(4096), gpu_model("sm90")
    work = near_far_work(shape, grids=[TokenGrid(0, 64, 64)], config=NearFarConfig(4, 1, 8))
    assert model.seconds(work, torch.bfloat16) == model.seconds(work._replace(copied=0.0), torch.bfloat16)


def test_near_far_on_this_device_pays_off_at_many_tokens_only():
    def at(tokens: int) -> tuple[AttentionShape, Work]:
        side = isqrt(tokens)
        shape = square(12 + side * side, heads=4)
        return shape, near_far_work(shape, grids=[TokenGrid(12, side, side)], config=NearFarConfig(4, 1, 0))

    found = break_even_tokens(at, dtype=torch.float32, device="cpu")
    assert 64 <= found <= 4_096
