from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ttr_controller.report import Results, load_results, sentences
from ttr_controller.report.findings import compare_policy

Make = Callable[[dict[str, Any]], Results]


@pytest.fixture
def load(tmp_path: Path) -> Make:
    def read(data: dict[str, Any]) -> Results:
        (tmp_path / "results.json").write_text(json.dumps(data))
        return load_results(tmp_path)

    return read


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def scale(data: dict[str, Any], method: str, factor: float, shares: tuple[float, ...] = (0.25, 0.5, 0.75)) -> None:
    for point in data["pareto"]["points"]:
        if point["method"] == method and point["full_share"] in shares:
            point["latent_rmse"] *= factor


def verdict(results: Results) -> str:
    assert results.pareto is not None
    return plain(sentences.policy_sentence(compare_policy(results.pareto)))


def test_the_headline_says_what_was_run(data: dict[str, Any], load: Make) -> None:
    text = plain(sentences.headline(load(data)))
    for part in ("Near-far students", "6 layers", "6 held-out prompts", "1,024 image tokens", "8 steps", "64 rollouts"):
        assert part in text
    data["controller"]["rollouts"] = 0
    assert "set by a probe" in sentences.headline(load(data))
    del data["controller"], data["pareto"]
    text = sentences.headline(load(data))
    assert "policy" not in text
    assert "held-out" not in text


def test_a_policy_that_is_better(data: dict[str, Any], load: Make) -> None:
    results = load(data)
    assert verdict(results) == (
        "The policy's latent error is no larger than the best simple baseline's at 49.8 %, 66.5 % and 83.2 % of the "
        "attention cost."
    )
    assert results.pareto is not None
    lines = [plain(line) for line in sentences.comparison_sentences(compare_policy(results.pareto))]
    assert all("25 % below the best simple baseline (first steps full" in line for line in lines)
    assert all("learning adds to the probe" in line for line in lines)


def test_a_policy_that_is_worse_everywhere(data: dict[str, Any], load: Make) -> None:
    scale(data, "policy", 1.6)
    results = load(data)
    assert verdict(results).startswith("The policy is worse than the best simple baseline at 49.8 %, 66.5 % and 83.2 %")
    assert "does not pay" in verdict(results)
    assert results.pareto is not None
    lines = [plain(line) for line in sentences.comparison_sentences(compare_policy(results.pareto))]
    assert all("20 % above the best simple baseline" in line for line in lines)
    assert all("learning adds nothing to the probe" in line for line in lines)


def test_a_policy_that_is_worse_at_one_cost(data: dict[str, Any], load: Make) -> None:
    scale(data, "policy", 1.6, (0.5,))
    text = verdict(load(data))
    assert text.startswith("The policy is worse than the best simple baseline at 66.5 % of the attention cost")
    assert text.endswith("and no worse at 49.8 % and 83.2 % of the attention cost.")


def test_a_small_difference_is_called_one(data: dict[str, Any], load: Make) -> None:
    scale(data, "policy", 0.95 / 0.7)
    results = load(data)
    assert results.pareto is not None
    line = sentences.comparison_sentences(compare_policy(results.pareto))[0]
    assert "a difference within the standard error" in line
    assert "above the best simple baseline" in line


def test_no_baseline(data: dict[str, Any], load: Make) -> None:
    data["pareto"]["points"] = [point for point in data["pareto"]["points"] if point["method"] == "policy"]
    assert "has not been measured beside a simple baseline" in verdict(load(data))


def test_break_even_and_its_absence(data: dict[str, Any], load: Make) -> None:
    timing = load(data).timing
    assert timing is not None
    step, attention = map(plain, sentences.payoff_sentences(timing, preferred="near_far"))
    assert step == (
        "A whole step with near-far pays on this machine from about 940 tokens on (310 ms against 560 ms at 4,096 "
        "tokens, 1.81 times as fast)."
    )
    assert attention.startswith("Attention alone with near-far pays on this machine from about 960 tokens on")
    for row in data["timing"]["rows"]:
        if row["variant"] == "near_far":
            row["step_ms"], row["attention_ms"] = row["step_ms"] * 3, row["attention_ms"] * 5
    # The recorded point stays: the times decide.
    timing = load(data).timing
    assert timing is not None
    for line in sentences.payoff_sentences(timing, preferred="near_far"):
        assert "does not pay on this machine at any measured size up to 4,096 tokens" in plain(line)
        assert "as fast" not in line


def test_training_that_helped_and_that_did_not(data: dict[str, Any], load: Make) -> None:
    fidelity = load(data).fidelity
    assert fidelity is not None
    assert "Training near-far lowered the mean by 10 % (0.00143 to 0.00129)." in plain(
        sentences.fidelity_sentences(fidelity)[-1]
    )
    for row in data["fidelity"]["rows"]:
        if row["when"] == "after":
            row["cosine_distance"] *= 2
    fidelity = load(data).fidelity
    assert fidelity is not None
    assert "raised the mean by 80 %, no gain" in plain(sentences.fidelity_sentences(fidelity)[-1])


def test_cost_is_not_time(data: dict[str, Any], load: Make) -> None:
    pareto = load(data).pareto
    assert pareto is not None
    assert str(sentences.cost_and_time_sentence(pareto)).startswith("Less arithmetic was also less time")
    data["pareto"]["points"][0]["seconds"] = 2.9
    pareto = load(data).pareto
    assert pareto is not None
    assert str(sentences.cost_and_time_sentence(pareto)).startswith("Less arithmetic hardly changed the time")
    data["pareto"]["points"][0]["seconds"] = 9.0
    pareto = load(data).pareto
    assert pareto is not None
    assert str(sentences.cost_and_time_sentence(pareto)).startswith("Less arithmetic was not less time")


def test_reward_that_did_not_rise(data: dict[str, Any], load: Make) -> None:
    controller = load(data).controller
    assert controller is not None
    assert str(sentences.learning_sentence(controller)).startswith("The reward rose")
    data["controller"]["curve"].reverse()
    controller = load(data).controller
    assert controller is not None
    assert str(sentences.learning_sentence(controller)).startswith("The reward did not rise")


def test_a_method_without_rewards_says_what_became_of_the_validation_error(data: dict[str, Any], load: Make) -> None:
    data["controller"]["curve"] = [{"rollouts": 0, "validation": 0.2}, {"rollouts": 28, "validation": 0.15}]
    controller = load(data).controller
    assert controller is not None
    said = plain(str(sentences.learning_sentence(controller)))
    assert said == "The error on the validation prompts fell: 0.200 with the first steps full, 0.150 after 28 rollouts."
    data["controller"]["curve"][1]["validation"] = 0.2
    controller = load(data).controller
    assert controller is not None
    assert "did not fall" in str(sentences.learning_sentence(controller))
    data["controller"]["curve"].pop()
    controller = load(data).controller
    assert controller is not None
    assert sentences.learning_sentence(controller) is None


def test_what_was_learnt_and_is_used(data: dict[str, Any], load: Make) -> None:
    distillation = load(data).distillation
    assert distillation is not None
    loss, cosine, kept = map(plain, sentences.distillation_sentences(distillation))
    assert loss == (
        "The training loss ended lower than it began in 6 of 6 layers, over 720 updates in all, on 8 sampled pictures."
    )
    assert cosine.startswith("The cosine distance on held-out queries ended lower than it began in 6 of 6 layers")
    assert kept == "What was learnt is used in 5 of 6 layers; elsewhere it was no better on held-out queries."


def test_errors_are_shown_as_errors_whatever_their_sign(data: dict[str, Any], load: Make) -> None:
    first = data["controller"]["curve"][0]
    before = load(data).controller
    first["quality"] *= -1
    after = load(data).controller
    assert before is not None
    assert after is not None
    assert before.curve[0].picture_error == after.curve[0].picture_error == pytest.approx(abs(first["quality"]))


def test_checks_are_counted(data: dict[str, Any], load: Make) -> None:
    data["checks"].append({"name": "not yet", "passed": None})
    assert plain(sentences.checks_sentence(load(data))) == "3 of 5 checks passed, 1 failed, 1 not measured."


def test_honesty_is_always_said(data: dict[str, Any], load: Make) -> None:
    for results in (load(data), load({"schema": 1, "preset": "hkr"})):
        text = " ".join(sentences.honesty(results))
        for part in ("toy", "emoji", "Times are this machine's", "Nothing here is a statement about Flux weights"):
            assert part in text
