from dataclasses import replace

import pytest
from attn_dispatch.backends import QkNorm, TaylorBackendConfig, options_of
from attn_kernels import TaylorConfig

# Name, default, smallest and largest value, in the order in which saved workflows store them.
STORED = """
P 4 1 8 | min_tokens 100 0 200000 | max_feature_dim_R 370000 1 1000000000 | block_size_q 32 1 8192
block_size_k 16 1 8192 | eps 1e-6 1e-12 1e-2 | fallback_on_negative True | allow_cross_attention True
max_head_dim 128 1 512 | sub_head_blocks 4 1 16 | qk_normalize False | qk_norm_clip 0.0 0 100
qk_norm_power 0.0 0 1 | qk_norm_sigma_max 0.0 0 50 | scale_mul 1.0 0 4 | force_fp32 False | memory_reserve True
memory_reserve_factor 1.1 1 4 | memory_reserve_log True | early_probe True | probe_samples 16 1 64 | denom_fp32 True
denom_fallback_frac_limit 0.0 0 1 | fused_kernel False | fused_full_kernel False
fused_feature_chunk_size 8192 128 200000 | fused_value_chunk_size 0 0 4096 | s_store_bf16 False
taylor_sigma_max 0.0 0 50 | taylor_layer_start -1 -1 512 | taylor_layer_end -1 -1 512 | auto_tune False
auto_tune_steps 1 0 4 | auto_tune_candidates 8 1 32 | auto_tune_quality_samples 4 1 32 | auto_tune_seed 0 0 100000
auto_tune_qk_norm_power_min 0.2 0 1 | auto_tune_qk_norm_power_max 0.7 0 1 | auto_tune_qk_norm_clip_min 8.0 0 100
auto_tune_qk_norm_clip_max 20.0 0 100 | auto_tune_scale_mul_min 0.8 0 4 | auto_tune_scale_mul_max 1.0 0 4
auto_tune_max_tokens 512 0 8192 | quality_check True | quality_check_samples 16 1 64
quality_check_log_every 1 1 1000 | log_shapes True | log_fallbacks True
"""
ROWS = [entry.split() for line in STORED.strip().splitlines() for entry in line.split(" | ")]


def test_names_defaults_ranges_and_order_of_saved_workflows_stay() -> None:
    options = options_of(TaylorBackendConfig)
    assert len(ROWS) == 48
    assert [one.name for one in options[:48]] == [row[0] for row in ROWS]
    for (name, default, known), row in zip(options, ROWS, strict=False):
        assert repr(default) == repr(type(default)(row[1] == "True" if isinstance(default, bool) else eval(row[1]))), (
            name
        )
        limits = [] if isinstance(default, bool) else [known.minimum, known.maximum]
        assert limits == [float(text) for text in row[2:]], name


def test_every_option_is_explained() -> None:
    options = options_of(TaylorBackendConfig)
    assert all(len(one.option.help) > 10 for one in options)
    assert len({one.option.help for one in options}) == len(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"P": 9}, "P must be at most 8"),
        ({"P": 3.0}, "P must be a whole number"),
        ({"coefficients": "chebyshev"}, "coefficients must be one of"),
        ({"auto_tune_scale_mul_min": 1.1}, "auto_tune_scale_mul_min 1.1 must not be above"),
        ({"auto_tune_qk_norm_clip_max": 7.0}, "auto_tune_qk_norm_clip_min 8.0 must not be above"),
        ({"taylor_layer_start": 5, "taylor_layer_end": 4}, "taylor_layer_start 5 must not be above taylor_layer_end 4"),
        ({"coefficients": "hermite", "centre": False}, "needs centre=True"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TaylorBackendConfig(), **changes)  # type: ignore[arg-type]


def test_one_open_end_of_the_layers_is_allowed() -> None:
    assert replace(TaylorBackendConfig(), taylor_layer_start=5).taylor_layer_end == -1


def test_what_the_operator_is_told() -> None:
    base = replace(TaylorBackendConfig(), block_size_q=256, block_size_k=128, eps=1e-4)
    assert base.operator() == TaylorConfig(key_chunk=128, eps=1e-4)
    assert replace(base, block_size_q=64).operator().key_chunk == 64
    fused = replace(base, fused_kernel=True, fused_feature_chunk_size=1024, fused_value_chunk_size=64)
    assert fused.operator() == TaylorConfig(path="streaming", feature_chunk=1024, value_chunk=64, eps=1e-4)
    assert replace(fused, fused_value_chunk_size=0).operator().value_chunk is None
    assert replace(fused, fused_full_kernel=True).operator() == TaylorConfig(path="full", eps=1e-4)
    assert replace(base, s_store_bf16=True, centre=False).operator() == TaylorConfig(
        key_chunk=128, eps=1e-4, store="bfloat16", centre=False
    )
    fitted = replace(base, coefficients="hermite", hermite_limit=0.9).operator()
    assert (fitted.coefficients, fitted.hermite_limit) == ("hermite", 0.9)


def test_norms_and_tuned_settings() -> None:
    config = TaylorBackendConfig(qk_normalize=True, qk_norm_clip=3.0, qk_norm_sigma_max=0.5, eps=1e-4)
    assert config.qk_norm == QkNorm(normalize=True, clip=3.0, sigma_max=0.5, eps=1e-4)
    tuned = config.tuned(0.4, 9.0, 0.85)
    assert (tuned.qk_norm_power, tuned.qk_norm_clip, tuned.scale_mul) == (0.4, 9.0, 0.85)
    assert replace(tuned, qk_norm_power=0.0, qk_norm_clip=3.0, scale_mul=1.0) == config


def test_recommended_settings_are_an_odd_series_of_the_whole_head_without_checks() -> None:
    config = TaylorBackendConfig.recommended()
    assert config.P % 2 == 1
    assert config.sub_head_blocks == 1
    assert (config.early_probe, config.fallback_on_negative, config.quality_check) == (False, False, False)
