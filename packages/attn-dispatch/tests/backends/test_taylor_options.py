"""Each option changes what it says: two backends that differ in it alone are seen to differ there."""

from dataclasses import replace

import pytest
import torch
from attn_dispatch.backends import TaylorBackendConfig, options_of

BASE = replace(TaylorBackendConfig(), P=3, sub_head_blocks=1, centre=False)
EVEN = replace(BASE, P=4, early_probe=False)
PROBE = replace(EVEN, early_probe=True)
FUSED = replace(BASE, fused_kernel=True)
TUNED = replace(EVEN, fallback_on_negative=False, auto_tune=True)
PLAIN, OPPOSED, HALF = {}, {"opposed": 4}, {"dtype": torch.bfloat16}

# Option, the options around it, its other value, the call, and where the difference shows.
CASES = [
    ("P", BASE, 5, PLAIN, "outputs"),
    ("min_tokens", BASE, 161, PLAIN, "reasons"),
    ("max_feature_dim_R", BASE, 152, PLAIN, "reasons"),
    ("block_size_q", replace(BASE, block_size_k=64, block_size_q=64), 32, PLAIN, "operator"),
    ("block_size_k", replace(BASE, block_size_k=64, block_size_q=64), 32, PLAIN, "operator"),
    ("eps", BASE, 1e-2, PLAIN, "operator"),
    ("fallback_on_negative", EVEN, False, OPPOSED, "reasons"),
    ("allow_cross_attention", BASE, False, {"kv_tokens": 120}, "reasons"),
    ("max_head_dim", BASE, 15, PLAIN, "reasons"),
    ("sub_head_blocks", BASE, 2, PLAIN, "outputs"),
    ("qk_normalize", BASE, True, PLAIN, "outputs"),
    ("qk_norm_clip", BASE, 2.0, PLAIN, "outputs"),
    ("qk_norm_power", BASE, 0.5, PLAIN, "outputs"),
    ("qk_norm_sigma_max", replace(BASE, qk_norm_power=0.5), 0.4, PLAIN, "outputs"),
    ("scale_mul", BASE, 0.7, PLAIN, "outputs"),
    ("force_fp32", replace(BASE, qk_norm_power=0.5), True, HALF, "outputs"),
    ("memory_reserve", BASE, False, PLAIN, "reserved"),
    ("memory_reserve_factor", BASE, 2.0, PLAIN, "reserved"),
    ("memory_reserve_log", BASE, False, PLAIN, "logs"),
    ("early_probe", PROBE, False, PLAIN, "probed"),
    ("probe_samples", PROBE, 9, PLAIN, "probed"),
    ("denom_fp32", BASE, False, HALF, "outputs"),
    ("denom_fallback_frac_limit", EVEN, 0.5, OPPOSED, "reasons"),
    ("fused_kernel", BASE, True, PLAIN, "operator"),
    ("fused_full_kernel", FUSED, True, PLAIN, "operator"),
    ("fused_feature_chunk_size", FUSED, 128, PLAIN, "operator"),
    ("fused_value_chunk_size", FUSED, 32, PLAIN, "operator"),
    ("s_store_bf16", BASE, True, PLAIN, "outputs"),
    ("taylor_sigma_max", BASE, 0.4, PLAIN, "reasons"),
    ("taylor_layer_start", BASE, 4, PLAIN, "reasons"),
    ("taylor_layer_end", BASE, 2, PLAIN, "reasons"),
    ("auto_tune", TUNED, False, OPPOSED, "outputs"),
    ("auto_tune_steps", TUNED, 0, OPPOSED, "choices"),
    ("auto_tune_candidates", TUNED, 1, OPPOSED, "choices"),
    ("auto_tune_quality_samples", TUNED, 32, OPPOSED, "choices"),
    ("auto_tune_seed", TUNED, 1, OPPOSED, "choices"),
    ("auto_tune_qk_norm_power_min", TUNED, 0.6, OPPOSED, "choices"),
    ("auto_tune_qk_norm_power_max", TUNED, 0.4, OPPOSED, "choices"),
    ("auto_tune_qk_norm_clip_min", TUNED, 1.0, OPPOSED, "choices"),
    ("auto_tune_qk_norm_clip_max", TUNED, 9.0, OPPOSED, "choices"),
    ("auto_tune_scale_mul_min", TUNED, 0.3, OPPOSED, "choices"),
    ("auto_tune_scale_mul_max", TUNED, 0.9, OPPOSED, "choices"),
    ("auto_tune_max_tokens", TUNED, 64, OPPOSED, "choices"),
    ("quality_check", BASE, False, PLAIN, "steps"),
    ("quality_check_samples", BASE, 9, PLAIN, "steps"),
    ("quality_check_log_every", BASE, 2, PLAIN, "steps"),
    ("log_shapes", BASE, False, PLAIN, "logs"),
    ("log_fallbacks", replace(BASE, min_tokens=1000), False, PLAIN, "logs"),
    ("log_steps", BASE, False, PLAIN, "logs"),
    ("centre", BASE, True, PLAIN, "outputs"),
    ("coefficients", replace(BASE, centre=True), "hermite", PLAIN, "outputs"),
    ("hermite_limit", replace(BASE, centre=True, coefficients="hermite"), 0.1, PLAIN, "outputs"),
]


def test_no_option_is_forgotten() -> None:
    assert [case[0] for case in CASES] == [one.name for one in options_of(TaylorBackendConfig)]


@pytest.mark.parametrize(("name", "config", "value", "shape", "where"), CASES, ids=[case[0] for case in CASES])
def test_an_option_changes_what_it_says(name, config, value, shape, where, make_call, watcher) -> None:
    assert getattr(config, name) != value
    calls = (make_call(**shape), make_call(**shape))
    seen, again, other = (watcher.run(one, *calls) for one in (config, config, replace(config, **{name: value})))
    assert same(getattr(seen, where), getattr(again, where)), "the observation itself is not repeatable"
    assert not same(getattr(seen, where), getattr(other, where))


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
