"""Held-out pictures at several costs: the learned routing beside every simple rule, and the picture sheet."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from attn_dispatch import DispatchReport
from PIL import Image
from torch import Tensor
from ttr_distill.files import write_atomically
from ttr_distill.tiny import Samples, retrieval_accuracy

from ttr_controller import budget
from ttr_controller.guard import ScheduleGuard
from ttr_controller.methods import METHODS
from ttr_controller.pipeline.routing import AUTO, DEFAULT_ROLLOUTS, Routing
from ttr_controller.pipeline.settings import Plan
from ttr_controller.pipeline.starting import PAIRS_AROUND_EXACT, full_shares, student_cost
from ttr_controller.pipeline.workbench import Students, Tick, Workbench
from ttr_controller.quality.latent import relative_rmse
from ttr_controller.quality.perceptual import psnr, ssim


@dataclass(frozen=True)
class Setting:
    """One point of the comparison.

    Attributes:
        method: Who chose the mask.
        full_share: Share of (step, layer) slots at full attention.
        mask: ``[steps, L]`` bool, True = full attention.
        level: Index of the cost level; ``None`` for all full and all student.
    """

    method: str
    full_share: float
    mask: Tensor
    level: int | None = None


METHODS_PER_LEVEL = 9
"""Methods that are compared at each cost where all rankings were measured."""
RULES = ("random", "first steps full", "last steps full", "distillation error by layer", "budget")
"""Methods that sample no student before they route."""
SHOWN = (
    ("layer error", "distillation error by layer"),
    *((name, name) for name in ("budget", "probe", "flips", "pairs", PAIRS_AROUND_EXACT)),
)
"""Rankings that are compared where they were measured, and their names in the report."""


def work(plan: Plan) -> float:
    """Units of progress: images sampled."""
    return float(plan.compare_prompts * (2 + METHODS_PER_LEVEL * plan.levels))


def settings_to_compare(routing: Routing, cost: float, levels: int, seed: int) -> Iterator[Setting]:
    """All masks of the comparison; at each level every method has exactly the same number of full slots."""
    steps, layers = routing.scores.shape
    yield Setting("all full", 1.0, budget.all_full(steps, layers))
    yield Setting("all student", 0.0, budget.all_student(steps, layers))
    everyone = torch.ones(layers, dtype=torch.bool)
    for level, share in enumerate(full_shares(cost, levels)):
        count = budget.slot_count(steps, everyone, share)
        exact_share = count / (steps * layers)
        generator = torch.Generator().manual_seed(seed + level)
        masks = {
            "random": budget.random_mask(steps, layers, count, generator),
            "first steps full": budget.first_steps_full(steps, layers, count),
            "last steps full": budget.last_steps_full(steps, layers, count),
        }
        masks |= {
            name: budget.top_k_mask(routing.rankings[ranking], count)
            for ranking, name in SHOWN
            if ranking in routing.rankings
        }
        masks["policy"] = routing.mask(count)
        for method, mask in masks.items():
            yield Setting(method, exact_share, mask, level)


def compare(bench: Workbench, students: Students, routing: Routing, tick: Tick) -> None:
    """Sample held-out prompts at every setting; record the sections ``pareto`` and ``sheet`` and write the pictures."""
    start = time.perf_counter()
    prompts, seeds = bench.heldout_set(bench.plan().compare_prompts)
    cost = student_cost(bench, students)
    teacher = bench.sampler.sample(prompts, seeds)
    retrieval = retrieval_accuracy(teacher.images, prompts)
    columns = [_column(bench, "teacher", "exact attention", teacher, f"retrieval {retrieval:.2f}")]
    points = []
    measured: dict[str, tuple[Samples, dict[str, object]]] = {}
    for setting in settings_to_compare(routing, cost, bench.plan().levels, bench.run.settings.seed):
        samples, point = _measure(bench, students, setting, (prompts, seeds), teacher)
        point["cost"] = setting.full_share + (1.0 - setting.full_share) * cost
        points.append(point)
        if setting.method == "policy":
            measured[f"policy, {100 * setting.full_share:.0f} % full"] = samples, point
        elif setting.method == "all student":
            measured["student everywhere"] = samples, point
        tick(len(prompts))
    order = sorted(measured, key=lambda name: -float(str(measured[name][1]["full_share"])))
    for number, name in enumerate(order):
        samples, point = measured[name]
        closeness = "equal to the teacher" if point["psnr"] is None else f"PSNR {point['psnr']:.1f} dB"
        detail = f"{closeness}, retrieval {point['retrieval']:.2f}"
        columns.append(_column(bench, name, detail, samples, f"cost {point['cost']:.2f}", number))
    section = {"prompts": prompts, "student_cost": cost, "teacher_retrieval": retrieval, "points": points}
    learner = str(bench.run.section("controller").get("learner", AUTO))
    section["not_run"] = not_run(points, len(prompts), learner)
    bench.run.results["sheet"] = {"prompts": prompts, "columns": columns}
    bench.run.record("pareto", section, time.perf_counter() - start)


def _measure(
    bench: Workbench, students: Students, setting: Setting, work: tuple[list[str], list[int]], teacher: Samples
) -> tuple[Samples, dict[str, object]]:
    """Sample one setting and compare it with the teacher's latents and pictures."""
    prompts, seeds = work
    report = DispatchReport()
    handler = bench.route(students.bank, (ScheduleGuard(setting.mask, bench.sampler.layers),), report)
    start = time.perf_counter()
    samples = bench.sampler.sample(prompts, seeds, handler)
    seconds = time.perf_counter() - start
    errors = relative_rmse(samples.latent, teacher.latent).double()
    closeness = psnr(samples.images, teacher.images).mean().item()
    return samples, {
        "method": setting.method,
        "full_share": setting.full_share,
        "latent_rmse": errors.mean().item(),
        "latent_rmse_se": (errors.std() / len(prompts) ** 0.5).item() if len(prompts) > 1 else 0.0,
        "latent_rmse_by_prompt": errors.tolist(),
        "psnr": closeness if math.isfinite(closeness) else None,  # equal pictures have none
        "ssim": ssim(samples.images, teacher.images).mean().item(),
        "retrieval": retrieval_accuracy(samples.images, prompts),
        "attention_seconds": report.attention_seconds(),
        "seconds": seconds,
    }


def _column(
    bench: Workbench, label: str, detail: str, samples: Samples, note: str, number: int | None = None
) -> dict[str, object]:
    """Write one column's pictures and describe it."""
    stem = "teacher" if number is None else f"setting_{number}"
    names = []
    for index, image in enumerate(samples.images):
        name = f"{stem}_{index}.png"
        write_atomically(bench.run.images / name, png_bytes(image))
        names.append(f"images/{name}")
    return {"label": label, "detail": f"{detail}, {note}", "images": names}


def png_bytes(image: Tensor) -> bytes:
    """Encode one picture ``[3, H, W]`` in [0, 1] as PNG."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def not_run(points: Sequence[dict[str, object]], prompts: int, learner: str) -> dict[str, str]:
    """Methods that the comparison lacks, and why: each learns for itself, for minutes.

    Args:
        points: Measured points of the comparison.
        prompts: Images of each point.
        learner: Method that the policy was learnt by.
    """
    image = max((float(str(point["seconds"])) for point in points), default=0.0) / max(1, prompts)
    known = {str(point["method"]) for point in points} | {learner}
    minutes = max(1, round(DEFAULT_ROLLOUTS * image / 60))
    why = f"{DEFAULT_ROLLOUTS} rollouts each, about {minutes} min on this machine"
    return {method: why for method in METHODS if method not in known}


def best_simple_baseline(points: Sequence[dict[str, object]], share: float) -> tuple[str, float]:
    """Name and latent error of the best rule without learning at one share of full attention."""
    rows = [
        (str(point["method"]), float(str(point["latent_rmse"])))
        for point in points
        if point["method"] in RULES and abs(float(str(point["full_share"])) - share) < 1e-9
    ]
    return min(rows, key=lambda row: row[1])
