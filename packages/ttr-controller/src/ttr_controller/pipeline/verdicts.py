"""What a run asks of itself, and whether it was met; judged from the recorded sections alone."""

from __future__ import annotations

from ttr_controller.pipeline.comparing import best_simple_baseline
from ttr_controller.pipeline.layer_fidelity import (
    CHOSEN_TILES_LIMIT,
    NEAR_FAR_LIMIT,
    PLAIN_SMALL,
    mean_cosine_distance,
    worst_cosine_distance,
)
from ttr_controller.pipeline.run_directory import Json, RunDirectory


def judge(run: RunDirectory) -> list[Json]:
    """Checks of a run whose phases are done, for the section ``checks``."""
    rows = run.section("fidelity")["rows"]
    points = run.section("pareto")["points"]
    assert isinstance(rows, list)
    assert isinstance(points, list)
    checks = [
        _at_most(
            "mean cosine distance of near-far with tiles of 2 x 2 and no chosen tiles, before training",
            mean_cosine_distance(rows, PLAIN_SMALL, "before"),
            NEAR_FAR_LIMIT,
        ),
        _at_most(
            "cosine distance of near-far with tiles of 4 x 4 and chosen ones, worst layer, before training",
            worst_cosine_distance(rows, "near_far", "before"),
            CHOSEN_TILES_LIMIT,
        ),
        _training_helps(rows, run.settings.preset),
        _retrieval(run),
    ]
    shares = sorted({float(point["full_share"]) for point in points if point["method"] == "policy"})
    for share in shares:
        checks.append(_policy_check(points, share))
    return checks


def _at_most(name: str, value: float, limit: float) -> Json:
    return {"name": name, "value": value, "limit": limit, "passed": value <= limit}


def _training_helps(rows: list[Json], preset: str) -> Json:
    before = mean_cosine_distance(rows, preset, "before")
    after = mean_cosine_distance(rows, preset, "after")
    return _at_most(f"mean cosine distance of {preset} after distillation, against before", after, before)


def _retrieval(run: RunDirectory) -> Json:
    """The student everywhere draws what the teacher draws."""
    section = run.section("pareto")
    points = section["points"]
    assert isinstance(points, list)
    student = next(point for point in points if point["method"] == "all student")
    value, limit = float(student["retrieval"]), float(str(section["teacher_retrieval"]))
    return {
        "name": "share of pictures with the student everywhere that show the prompted concept, at least the teacher's",
        "value": value,
        "limit": limit,
        "passed": value >= limit,
    }


def _policy_check(points: list[Json], share: float) -> Json:
    policy = next(point for point in points if point["method"] == "policy" and float(str(point["full_share"])) == share)
    rule, error = best_simple_baseline(points, share)
    cost = float(str(policy["cost"]))
    return _at_most(
        f"held-out latent error of the policy at cost {cost:.2f}, against the best simple rule ({rule})",
        float(str(policy["latent_rmse"])),
        error,
    )
