import math
from collections.abc import Callable

import numpy as np
import pytest
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor
from ttr_distill.comet_metrics import (
    ControllerMetricNames,
    DistillMetricNames,
    finite_numbers,
    pareto_frontier,
    should_log_step,
    spread,
)
from ttr_distill.metrics import MetricValue
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.distiller import DistillConfig, Distiller


def row(layer: str, updates: int, **entries: MetricValue) -> dict[str, MetricValue]:
    base: dict[str, MetricValue] = {"kind": "distill", "layer": layer, "updates": updates, "run": 1, "level": "unready"}
    return base | entries


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0.2], (0.8, 0.2)),
        ([0.1, 0.3], (1.4, 0.3)),
        ([], (0.0, None)),
        ([0.1, math.nan], (0.0, 1.0)),
        ([-1.0], (1.0, 0.0)),
    ],
)
def test_pareto_frontier(distances: list[float], expected: tuple[float, float | None]) -> None:
    assert pareto_frontier(distances) == pytest.approx(expected)


def test_spread_is_numpys_quantile_of_the_finite_values() -> None:
    values = [3.0, math.nan, -1.0, 7.5, 0.25, math.inf, 2.0]
    finite = [value for value in values if math.isfinite(value)]
    expected = dict(zip(("min", "p25", "p50", "p75", "max"), np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)), strict=True))
    assert spread(values) == pytest.approx(expected)
    assert spread([math.nan]) == {}


@pytest.mark.parametrize(
    ("step", "every", "total", "first", "due"),
    [
        (0, 1, 10, True, False),
        (1, 10, None, True, True),
        (1, 10, None, False, False),
        (10, 10, None, False, True),
        (11, 10, 11, False, True),
        (5, 0, None, False, True),
    ],
)
def test_cadence(step: int, every: int, total: int | None, first: bool, due: bool) -> None:
    assert should_log_step(step, every, total, first=first) is due


def test_layers_are_sent_when_their_updates_pass_a_multiple() -> None:
    names = DistillMetricNames(every=50, total=120)
    assert names.take(row("single:0", 30, loss=1.0)) is None
    assert names.take(row("single:1", 15, loss=3.0)) is None
    record = names.take(row("single:0", 40, loss=2.0, cosine=0.1, ema_cosine=0.3, level="ready"))
    assert record is not None
    assert record.step == 55
    metrics = record.metrics
    assert metrics["flux2ttr/single:0/loss"] == 2.0
    assert metrics["flux2ttr/single:1/loss"] == 3.0
    assert metrics["flux2ttr/single:0/avg_loss"] == 1.5
    assert metrics["flux2ttr/single:0/ema_loss"] == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    assert "flux2ttr/single:1/avg_loss" not in metrics
    assert metrics["flux2ttr/single:0/cosine_similarity"] == pytest.approx(0.9)
    assert metrics["flux2ttr/single:0/ema_cosine_dist"] == 0.3
    assert metrics["flux2ttr/single:0/ready"] == 1.0
    overall = {name.removeprefix("flux2ttr/global/"): value for name, value in metrics.items() if "/global/" in name}
    assert overall["updates_done"] == 55.0
    assert overall["steps_remaining"] == 65.0
    assert (overall["layers_tracked"], overall["layers_ready"], overall["layers_ready_ratio"]) == (2.0, 1.0, 0.5)
    assert (overall["loss_min"], overall["loss_p50"], overall["loss_max"]) == (2.0, 2.5, 3.0)
    assert overall["pareto_frontier"] == pytest.approx(0.7)
    assert overall["pareto_worst_ema_cosine_dist"] == pytest.approx(0.3)
    assert "mse_min" not in overall, "a number that no layer has is not sent"
    assert names.take(row("single:1", 20, loss=3.0)) is None
    assert names.take(row("single:1", 80, loss=3.0)) is not None, "the last update is sent whatever the cadence"


def test_what_was_not_sent_is_sent_at_the_end() -> None:
    names = DistillMetricNames(every=50)
    assert names.final() is None
    assert names.take(row("single:0", 3, loss=1.0)) is None
    record = names.final()
    assert record is not None
    assert record.step == 3
    assert names.final() is None


def test_nothing_that_is_not_finite_or_no_number_is_sent() -> None:
    names = DistillMetricNames(every=1)
    record = names.take(row("single:0", 1, loss=math.nan, huber=None, heldout_relative_l2=0.5, note="text"))
    assert record is not None
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["flux2ttr/single:0/nmse"] == 0.25
    assert not any(name.endswith(("loss", "huber", "note", "layer", "run", "kind")) for name in record.metrics)
    assert names.take({"kind": "other", "value": 1}) is None
    assert finite_numbers({"a": True, "b": 1, "c": math.inf, "d": "1", "e": None}) == {"a": 1.0, "b": 1.0}


def test_the_controllers_first_and_last_step_are_always_sent() -> None:
    names = ControllerMetricNames(every=10, total=13)
    records = [names.take({"step": step, "reward": -step, "full_attn_ratio": 0.5}) for step in range(1, 14)]
    assert [record.step for record in records if record is not None] == [1, 10, 13]
    assert records[0] is not None
    assert records[0].metrics == {
        "flux2ttr_controller/step": 1.0,
        "flux2ttr_controller/reward": -1.0,
        "flux2ttr_controller/full_attn_ratio": 0.5,
        "flux2ttr_controller/full_attn_eligible": 0.5,
    }


def test_a_finished_controller_says_so_and_an_interrupted_one_does_not() -> None:
    names = ControllerMetricNames(every=10, total=3)
    for step in (1, 2, 3):
        names.take({"step": step, "reward_baseline": -0.25, "iteration": 2})
    record = names.final()
    assert record is not None
    assert record.metrics == {
        "flux2ttr_controller/training_completed": 1.0,
        "flux2ttr_controller/total_steps": 3.0,
        "flux2ttr_controller/total_iterations": 2.0,
        "flux2ttr_controller/final_reward_baseline": -0.25,
    }
    names = ControllerMetricNames(every=10, total=30)
    names.take({"step": 1})
    assert names.final() is None
    names.take({"step": 2, "reward": 1.0})
    record = names.final()
    assert record is not None
    assert "flux2ttr_controller/reward" in record.metrics
    assert "flux2ttr_controller/training_completed" not in record.metrics


def test_rows_of_a_real_training_carry_the_names_that_charts_use(
    make_call: Callable[..., AttentionCall], native: Callable[[AttentionCall], Tensor]
) -> None:
    layers = (LayerKey("single", 0), LayerKey("single", 1))
    bank = StudentBank.for_layers(preset("hkr"), layers, 2, 16, seed=3)
    config = DistillConfig(min_swap_layers=2, heldout_period=0)
    distiller = Distiller(bank, ReadinessTracker(ReadinessConfig(1.0, 1.0, minimum_updates=1)), config, seed=5)
    distiller.begin_run()
    for layer in layers:
        distiller(make_call(1, layer=layer), native)
    distiller.end_run()
    distiller.raise_pending()
    names = DistillMetricNames(every=2)
    records = [names.take(row) for row in distiller.metrics]
    assert records[0] is None
    assert records[1] is not None
    sent = records[1].metrics
    for layer in layers:
        for name in ("loss", "nmse", "cosine_similarity", "ema_loss", "ema_cosine_dist", "updates", "ready"):
            assert f"flux2ttr/{layer}/{name}" in sent
    assert sent["flux2ttr/global/layers_ready"] == 2.0
    worst = max(distiller.readiness[layer].ema_cosine or 0.0 for layer in layers)
    assert sent["flux2ttr/global/pareto_frontier"] == pytest.approx(2 * (1 - min(1.0, worst)))
