from dataclasses import replace
from random import Random

import pytest
import torch
from attn_dispatch import LayerKey
from attn_dispatch.backends import TaylorBackend, TaylorBackendConfig, TaylorTuner
from attn_kernels import relative_l2, softmax_attention

BASE = replace(
    TaylorBackendConfig(),
    P=4,
    sub_head_blocks=1,
    centre=False,
    early_probe=False,
    fallback_on_negative=False,
    quality_check=False,
    auto_tune=True,
)


def test_candidates_are_draws_of_the_seed_and_the_step() -> None:
    config = replace(BASE, auto_tune_seed=5, auto_tune_candidates=3)
    random = Random(5 + 2)
    expected = [(random.uniform(0.2, 0.7), random.uniform(8, 20), random.uniform(0.8, 1.0)) for _ in range(3)]
    assert TaylorTuner(config).candidates(2) == expected


def test_every_layer_is_searched_in_every_step_that_was_asked_for(make_call, watcher) -> None:
    calls = [make_call(sigma=s, layer=f"single:{i}", opposed=4) for s in (1.0, 0.8, 0.6, 0.4) for i in range(3)]
    seen = watcher.run(replace(BASE, auto_tune_steps=2), *calls)
    assert list(seen.choices) == ["single:0", "single:1", "single:2"]
    assert {choice.searches for choice in seen.choices.values()} == {2}
    # One answer per call, and per search one for the settings in use and each candidate.
    assert len(seen.operator) == len(calls) + 2 * 3 * (1 + 8)


def test_a_layer_that_calls_twice_in_a_step_is_searched_once(make_call, watcher) -> None:
    seen = watcher.run(replace(BASE, auto_tune_steps=1), make_call(), make_call())
    assert seen.choices["single:3"].searches == 1


def test_what_was_chosen_is_used_from_then_on_and_forgotten_with_the_run(make_call) -> None:
    backend = TaylorBackend(BASE)
    backend.begin_run()
    call = make_call(opposed=4)
    first, later = backend(call), backend(replace(call, step=make_call(sigma=0.1).step))
    choice = backend.tuner.choices[LayerKey("single", 3)]
    fixed = TaylorBackend(replace(BASE.tuned(choice.power, choice.clip, choice.scale_mul), auto_tune=False))(call)
    assert torch.equal(first, fixed)
    assert torch.equal(later, fixed)
    backend.end_run()
    assert backend.tuner.choices
    backend.begin_run()
    assert not backend.tuner.choices


def test_the_choice_is_the_best_of_what_was_tried(make_call) -> None:
    """Scores recomputed from whole backends with fixed settings on the same few tokens."""
    call = make_call(tokens=128, opposed=4)
    config = replace(BASE, auto_tune_quality_samples=32, auto_tune_candidates=6)
    tuned = TaylorBackend(config)
    tuned.begin_run()
    tuned(call)
    choice = tuned.tuner.choices[LayerKey("single", 3)]
    exact = softmax_attention(call.q, call.k, call.v).out
    scores = {}
    for setting in [(0.0, 0.0, 1.0), *tuned.tuner.candidates(0)]:
        output = TaylorBackend(replace(config.tuned(*setting), auto_tune=False))(call)
        bad = output.isnan()
        error = (output - exact).abs()[~bad].mean()
        scores[setting] = float(error + 10 * bad.any(dim=3).float().mean())
    assert min(scores, key=scores.__getitem__) == (choice.power, choice.clip, choice.scale_mul)
    # The tuner looks at a quarter of the queries.
    assert choice.score == pytest.approx(min(scores.values()), rel=0.3)
    assert choice.start_score > 2 > choice.score


def test_layers_choose_for_themselves(make_call, watcher) -> None:
    seen = watcher.run(BASE, make_call(layer="single:0", opposed=4), make_call(layer="single:1", logit_std=0.4))
    assert seen.choices["single:0"].power > 0
    assert seen.choices["single:1"].power == 0


def test_tuning_helps(make_call) -> None:
    call = make_call(opposed=4)
    exact = softmax_attention(call.q, call.k, call.v).out
    tuned = TaylorBackend(BASE)(call)
    assert tuned.isfinite().all()
    assert not TaylorBackend(replace(BASE, auto_tune=False))(call).isfinite().all()
    assert relative_l2(tuned, exact) < 1.0


@pytest.mark.parametrize("changes", [{"qk_normalize": True}, {"auto_tune_steps": 0}, {"auto_tune": False}])
def test_where_nothing_is_to_be_tuned_nothing_is(changes, make_call, watcher) -> None:
    seen = watcher.run(replace(BASE, **changes), make_call(opposed=4))
    assert seen.choices == {}
    assert len(seen.operator) == 1


def test_steps_above_the_limit_of_the_norms_are_neither_searched_nor_changed(make_call, watcher) -> None:
    config = replace(BASE, qk_norm_sigma_max=0.5)
    calls = [make_call(sigma=sigma, opposed=4) for sigma in (0.9, 0.5, 0.9)]
    seen = watcher.run(config, *calls)
    assert seen.choices["single:3"].searches == 1
    untuned = TaylorBackend(replace(config, auto_tune=False))(calls[0])
    assert torch.equal(seen.outputs[0].nan_to_num(9), untuned.nan_to_num(9))
    assert torch.equal(seen.outputs[2].nan_to_num(9), untuned.nan_to_num(9))
    assert seen.outputs[1].isfinite().all()


def test_long_calls_are_thinned_over_all_tokens_and_masks(make_call, watcher) -> None:
    call = make_call(tokens=1100, opposed=4)
    keep = torch.arange(1100)[None] < 600
    hidden = call.k.masked_fill(~keep[:, None, :, None], float("nan"))
    seen = watcher.run(replace(BASE, auto_tune_max_tokens=100), replace(call, k=hidden, key_mask=keep))
    assert seen.choices["single:3"].score < 2
    assert seen.outputs[0].isfinite().all()


def test_long_calls_are_judged_on_late_tokens_too(make_call, watcher) -> None:
    call = make_call(tokens=1100, opposed=4)
    early = torch.arange(1100)[:, None] < 550
    call = replace(call, q=torch.where(early, call.q.abs(), call.q))
    seen = watcher.run(replace(BASE, auto_tune_max_tokens=100), call)
    assert seen.choices["single:3"].start_score > 0.5
    assert seen.outputs[0].isfinite().all()


def test_the_run_ends_with_one_line_of_what_was_chosen(make_call, watcher) -> None:
    seen = watcher.run(BASE, *(make_call(layer=f"single:{i}", opposed=4) for i in range(2)))
    (line,) = (line for line in seen.logs if line.startswith("Taylor auto-tune"))
    assert line.startswith("Taylor auto-tune, 2 layers: single:0: power=0.")
    assert "single:1: power=" in line
