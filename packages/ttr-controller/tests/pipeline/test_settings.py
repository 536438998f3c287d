import pytest
import torch
from ttr_controller.pipeline.settings import Plan, QuickstartSettings, RunError, make_plan, resolve_device


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "neer_far"}, "unknown preset 'neer_far'; choose one of hkr, "),
        ({"budget_minutes": 0.0}, "budget"),
        ({"budget_minutes": float("nan")}, "budget"),
        ({"rows": 4}, "8 x 8"),
        ({"steps": 1}, "2 steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        QuickstartSettings(**wrong)  # type: ignore[arg-type]


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(RunError, match="unknown device 'gpu0'"):
        resolve_device("gpu0")
    with pytest.raises(RunError, match="not on 'meta'"):
        resolve_device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(RunError, match="no CUDA device"):
        resolve_device("cuda")


def _predicted_minutes(settings: QuickstartSettings, plan: Plan, forward: float, student: float) -> float:
    """Time of the amounts, counted independently of how they were chosen."""
    images = plan.distill_images + plan.fidelity_prompts + plan.compare_prompts * (1 + 4 * plan.levels)
    judged = (4 + 5 * plan.levels) * plan.validation_prompts
    student_images = plan.rollouts + judged + plan.compare_prompts * (1 + 5 * plan.levels)
    slots = settings.steps * 6
    pairs = plan.probe_prompts * slots * (1 + (settings.steps + 1) / 2) * student
    return (settings.steps * (images * forward + student_images * student) + pairs) / 60


@pytest.mark.parametrize("forward", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("budget", [2.0, 4.0, 10.0])
def test_the_work_fits_the_budget(forward: float, budget: float) -> None:
    settings = QuickstartSettings(budget_minutes=budget)
    plan = make_plan(settings, 6, forward, 1.1 * forward)
    smallest = make_plan(QuickstartSettings(budget_minutes=0.1), 6, forward, 1.1 * forward)
    minutes = _predicted_minutes(settings, plan, forward, 1.1 * forward)
    assert minutes <= max(budget, _predicted_minutes(settings, smallest, forward, 1.1 * forward) * 3)
    assert plan.rollouts % 4 == 0


def test_more_time_is_more_work() -> None:
    short, long = (make_plan(QuickstartSettings(budget_minutes=b), 6, 0.1, 0.11) for b in (1.0, 8.0))
    assert short.rollouts < long.rollouts
    assert short.compare_prompts < long.compare_prompts
    assert Plan.from_mapping(long.__dict__) == long
