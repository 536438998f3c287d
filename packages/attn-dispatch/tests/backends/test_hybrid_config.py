from dataclasses import replace

import pytest
from attn_dispatch.backends import HybridBackendConfig, QkNorm, options_of

# Name, default, smallest and largest value, in the order in which saved workflows store them.
STORED = """
local_window 512 0 8192 | local_window_min 512 0 8192 | local_window_max 512 0 8192 | local_window_sigma_low 0.0 0 50
local_window_sigma_high 0.0 0 50 | local_chunk 256 1 1000000000 | prefix_tokens 0 0 8192 | global_dim 16 1 128
global_P 2 1 4 | global_weight 0.1 0 4 | global_sigma_low 0.0 0 50 | global_sigma_high 0.0 0 50
global_scale_mul 1.0 0 4 | global_norm_power 0.0 0 1 | global_norm_clip 0.0 0 100 | use_pca True
pca_samples 2048 0 65536 | allow_cross_attention True | layer_start -1 -1 512 | layer_end -1 -1 512
eps 1e-6 1e-12 1e-2 | force_fp32 True | log_steps True | log_quality_stats False
"""
ROWS = [entry.split() for line in STORED.strip().splitlines() for entry in line.split(" | ")]


def test_names_defaults_ranges_and_order_of_saved_workflows_stay() -> None:
    options = options_of(HybridBackendConfig)
    assert [one.name for one in options[: len(ROWS)]] == [row[0] for row in ROWS]
    for (name, default, known), row in zip(options, ROWS, strict=False):
        expected = row[1] == "True" if isinstance(default, bool) else type(default)(float(row[1]))
        assert repr(default) == repr(expected), name
        limits = [] if isinstance(default, bool) else [known.minimum, known.maximum]
        assert limits == [float(text) for text in row[2:]], name


RAMP = HybridBackendConfig(
    local_window=300,
    local_window_min=100,
    local_window_max=420,
    local_window_sigma_low=0.2,
    local_window_sigma_high=1.0,
    global_weight=0.8,
    global_sigma_low=0.2,
    global_sigma_high=1.0,
)


@pytest.mark.parametrize(
    ("sigma", "window"),
    # At a quarter of the way 3 t^2 - 2 t^3 is 5/32, at three quarters 27/32.
    [(0.0, 100), (0.2, 100), (0.4, 150), (0.6, 260), (0.8, 370), (1.0, 420), (7.0, 420), (None, 300)],
)
def test_the_window_follows_the_noise_level_smoothly(sigma: float | None, window: int) -> None:
    assert RAMP.window_at(sigma, 4000) == window


def test_a_window_of_zero_is_all_keys_at_either_end() -> None:
    assert replace(RAMP, local_window_max=0).window_at(1.0, 4000) == 4000
    assert replace(RAMP, local_window_max=0).window_at(0.6, 4100) == 2100
    assert replace(RAMP, local_window_min=0).window_at(0.1, 4000) == 4000
    assert replace(RAMP, local_window=0).window_at(None, 77) == 77


@pytest.mark.parametrize("high", [0.0, 0.2])
def test_without_a_range_of_noise_levels_there_is_no_schedule(high: float) -> None:
    config = replace(RAMP, local_window_sigma_high=high, global_sigma_high=high)
    for sigma in (0.0, 0.2, 5.0, None):
        assert config.window_at(sigma, 4000) == 300
        assert config.weight_at(sigma) == 0.8


@pytest.mark.parametrize(
    ("sigma", "weight"), [(0.1, 0.8), (0.2, 0.8), (0.6, 0.4), (0.9, 0.1), (1.0, 0.0), (3.0, 0.0), (None, 0.8)]
)
def test_the_weight_falls_with_the_noise_level(sigma: float | None, weight: float) -> None:
    assert RAMP.weight_at(sigma) == pytest.approx(weight)


def test_norms() -> None:
    config = HybridBackendConfig(global_norm_power=0.4, global_norm_clip=3.0, eps=1e-4)
    assert config.low_norm == QkNorm(power=0.4, clip=3.0, eps=1e-4)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_start 5 must not be above layer_end 4"):
        HybridBackendConfig(layer_start=5, layer_end=4)
    with pytest.raises(ValueError, match="combine must be one of"):
        HybridBackendConfig(combine="convex")


def test_recommended_settings_are_attention_under_one_denominator() -> None:
    config = HybridBackendConfig.recommended()
    assert (config.combine, config.global_weight, config.global_P % 2) == ("shared", 1.0, 1)
