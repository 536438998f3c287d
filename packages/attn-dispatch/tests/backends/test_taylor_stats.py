import json
from dataclasses import replace

import pytest
import torch
from attn_dispatch import StepContext
from attn_dispatch.backends import TaylorBackendConfig
from attn_dispatch.backends.taylor_config import TaylorBackendConfig as Config
from attn_dispatch.backends.taylor_stats import DIAGNOSED, StepTally, diagnose
from attn_kernels import softmax_attention

BASE = replace(TaylorBackendConfig(), P=3, sub_head_blocks=1, centre=False)


def test_a_call_counts_once_whatever_its_blocks(make_call, watcher) -> None:
    (step,) = watcher.run(replace(BASE, sub_head_blocks=4), *(make_call(layer=f"single:{i}") for i in range(3))).steps
    assert (step.calls, step.taylor_calls, step.fallback_calls) == (3, 3, 0)
    assert step.den_stats is not None
    assert (step.den_stats.count, step.den_stats.blocks) == (3 * 2 * 4 * 160, 3)


def test_a_step_ends_where_the_noise_level_changes(make_call, watcher) -> None:
    calls = [make_call(sigma=sigma, layer=f"single:{i}") for sigma in (1.0, 0.6, 0.3) for i in range(2)]
    seen = watcher.run(BASE, *calls)
    assert [(step.sigma, step.calls) for step in seen.steps] == [(1.0, 2), (0.6, 2), (0.3, 2)]
    lines = [line for line in seen.logs if line.startswith("Taylor step stats")]
    assert [line.split()[3] for line in lines] == ["sigma=1", "sigma=0.6", "sigma=0.3"]


def test_an_unknown_noise_level_is_one_step_a_run(make_call, watcher) -> None:
    (step,) = watcher.run(BASE, make_call(sigma=None), make_call(sigma=None)).steps
    assert (step.sigma, step.calls) == (None, 2)


def test_guidance_in_separate_calls_is_one_step(make_call, watcher) -> None:
    call = make_call()
    halves = [replace(call, step=StepContext(0.5, cond_or_uncond=(part,))) for part in (0, 1)]
    assert len(watcher.run(BASE, *halves).steps) == 1


def test_denominators_are_sums_over_the_keys(make_call, watcher) -> None:
    call = make_call()
    (step,) = watcher.run(BASE, call).steps
    scores = call.q.double() @ call.k.double().transpose(-1, -2) / 4
    den = (1 + scores + scores**2 / 2).sum(-1)
    assert step.den_stats is not None
    assert step.den_stats.min == pytest.approx(float(den.min()), rel=1e-4)
    assert step.den_stats.max == pytest.approx(float(den.max()), rel=1e-4)
    assert step.den_stats.sum == pytest.approx(float(den.sum()), rel=1e-4)
    assert step.den_stats.le_eps == 0


def test_extremes_and_sums_are_over_all_calls_of_a_step(make_call, watcher) -> None:
    calls = [make_call(tokens=tokens, seed=tokens) for tokens in (120, 300, 200)]
    (step,) = watcher.run(BASE, *calls).steps
    alone = [watcher.run(BASE, call).steps[0].den_stats for call in calls]
    found = [one for one in alone if one is not None]
    assert len(found) == 3
    assert step.den_stats is not None
    assert step.den_stats.min == min(one.min for one in found) == found[0].min
    assert step.den_stats.max == max(one.max for one in found) == found[1].max
    assert step.den_stats.sum == pytest.approx(sum(one.sum for one in found), rel=1e-5)


def test_bad_denominators_are_counted_and_left_out_of_the_rest(make_call, watcher) -> None:
    even = replace(BASE, P=4, early_probe=False, fallback_on_negative=False)
    call = make_call(opposed=4)
    (step,) = watcher.run(even, call).steps
    scores = call.q.double() @ call.k.double().transpose(-1, -2) / 4
    den = (1 + scores + scores**2 / 2 + scores**3 / 6).sum(-1)
    assert step.den_stats is not None
    assert step.den_stats.le_eps == int((den <= 0).sum()) > 0
    assert step.den_stats.min == pytest.approx(float(den[den > 0].min()), rel=1e-3)


def test_fallbacks_are_counted_by_their_first_word(make_call, watcher) -> None:
    even = replace(BASE, P=4, early_probe=False)
    (step,) = watcher.run(even, make_call(opposed=4), make_call(tokens=50), make_call(tokens=60), make_call()).steps
    assert step.fallback_reasons == {"denominator_too_small": 1, "below_min_tokens": 2}
    assert (step.calls, step.taylor_calls, step.fallback_calls, step.denom_fallbacks) == (4, 1, 3, 1)
    assert step.denom_fallback_frac == 0.25
    assert "denom_fallback_frac=0.25 reasons={'denominator_too_small': 1, 'below_min_tokens': 2}" in str(step)


def test_quality_is_measured_against_both_kinds_of_exact_attention(make_call, watcher) -> None:
    config = replace(BASE, quality_check_samples=64, scale_mul=0.5)
    call = make_call(tokens=110)
    seen = watcher.run(replace(config, quality_check_samples=64), call)
    (step,) = seen.steps
    exact = softmax_attention(call.q, call.k, call.v).out
    halved = softmax_attention(call.q, call.k, call.v, scale=0.125).out
    for figures, target in ((step.quality_raw, exact), (step.quality_eff, halved)):
        assert figures is not None
        assert figures.samples == 64 * 2 * 12
        error = float((seen.outputs[0] - target).abs().mean())
        assert figures.mean_abs == pytest.approx(error, rel=0.35)
    assert step.quality_raw is not None
    assert step.quality_eff is not None
    assert step.quality_eff.relative_l2 < 0.3 * step.quality_raw.relative_l2


def test_quality_with_blocks_compares_whole_heads_and_blocks(make_call, watcher) -> None:
    (step,) = watcher.run(replace(BASE, sub_head_blocks=4, P=7), make_call(logit_std=0.7)).steps
    assert step.quality_raw is not None
    assert step.quality_eff is not None
    assert step.quality_eff.relative_l2 < 0.06
    assert step.quality_raw.relative_l2 > 0.3


def test_quality_is_measured_in_every_so_many_calls(make_call, watcher) -> None:
    calls = [make_call() for _ in range(7)]
    (step,) = watcher.run(replace(BASE, quality_check_log_every=3), *calls).steps
    assert step.quality_raw is not None
    assert step.quality_raw.calls == 3


def test_figures_are_values_that_json_can_write(make_call, watcher) -> None:
    (step,) = watcher.run(BASE, make_call()).steps
    read = json.loads(json.dumps(step.to_dict()))
    assert read["config"]["P"] == 3
    assert len(read["config"]) == 20
    assert set(read["quality"]) == {"sum_abs", "sum_rel", "max_abs", "max_rel", "samples"}
    assert read["quality"]["sum_abs"] == pytest.approx(read["quality_raw"]["mean_abs"] * read["quality"]["samples"])
    assert tuple(read["diag"]) == DIAGNOSED
    assert "config[P=3 " in str(step)


def test_diagnosis_describes_norms_and_scores(make_call) -> None:
    call = make_call()
    queries, keys = torch.tensor([0, 7, 80, 159]), torch.tensor([3, 4, 5])
    rows = diagnose(call.q, call.k, 0.25, queries, keys)
    scores = (0.25 * call.q[:, :, queries] @ call.k[:, :, keys].transpose(-1, -2)).flatten()
    for row, values in zip(
        rows, (call.q[:, :, queries].norm(dim=-1), call.k[:, :, keys].norm(dim=-1), scores), strict=True
    ):
        ordered = values.flatten().sort().values
        count = len(ordered)
        expected = [
            ordered[0],
            values.mean(),
            *(ordered[int(share * (count - 1))] for share in (0.5, 0.9, 0.99)),
            ordered[-1],
        ]
        torch.testing.assert_close(row, torch.stack(expected))


def test_an_open_step_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="close the step"):
        StepTally(0.5, Config()).stats()
