"""Compare every way of routing on the embedded teacher: held-out error at equal attention cost, over several seeds.

Run from the repository root, for example::

    nice -n 19 python scripts/controller_table.py --student near_far --out benchmarks/results/controller-2026-01-31.json

Each seed has its own training images, held-out images and draws. Finished seeds are kept in the output file, so that an
interrupted comparison goes on where it stopped; a second student is added to the same file. ``--readme FILE`` prints
the file's tables in Markdown.

The column of LPIPS has random weights in its backbone (and needs the extra ``lpips``): it shows that images are
compared, not what people see.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from attn_dispatch.call import TokenLayout
from attn_kernels import TokenGrid
from attn_kernels.cost import exact_flops
from torch import Tensor
from ttr_controller import budget
from ttr_controller.costs import AttentionCosts
from ttr_controller.guard import ScheduleGuard
from ttr_controller.judge import Judge
from ttr_controller.methods import (
    Images,
    Ranking,
    rank_by_budget,
    rank_by_flips,
    rank_by_layer_error,
    rank_by_pairs,
    rank_by_probe,
    rank_by_reinforce,
    rank_by_relaxed_gates,
    simple_rules,
)
from ttr_controller.pipeline.differentiable import DifferentiableTinySampler
from ttr_controller.policy import PolicyConfig
from ttr_controller.quality.latent import relative_rmse
from ttr_controller.quality.learned import LpipsDistance
from ttr_controller.relaxed import RelaxedConfig
from ttr_controller.trainer import ControllerConfig
from ttr_distill.files import write_atomically
from ttr_distill.student import ReadinessTracker, StudentBackend, StudentBank, StudentConfig, preset
from ttr_distill.tiny import heldout_prompts, load_teacher, training_prompts
from ttr_distill.training import DistillConfig, Distiller

COSTS = (0.25, 0.5, 0.75)
ZERO_ROLLOUT = ("random", "first steps", "last steps", "layer error", "budget")
RANDOM_DRAWS = 3
ORDER = (*ZERO_ROLLOUT, "probe", "flips", "pairs", "relaxed", "reinforce")
SMOKE_LEVEL = 0.5
LABELS = MappingProxyType(
    {
        "layer error": "distillation error by layer",
        "budget": "distillation error and cost by a knapsack (`budget`)",
    }
)


@dataclass(frozen=True)
class Amounts:
    """How much of everything a seed gets.

    Attributes:
        probe_images: Training images of probe and flips.
        pair_images: Training images of the pairs.
        relaxed_iterations: Gradient steps of relaxed gates, two images each.
        updates: REINFORCE updates of four rollouts.
        judged: Training images on which REINFORCE compares its candidates.
        pool: Training images that relaxed gates and REINFORCE draw from.
        heldout: Held-out images.
        distill_images: Images that students which need training learn from, once for all seeds.
        distill_updates: Updates for each attention call of these images that is learned from.
    """

    probe_images: int = 2
    pair_images: int = 12
    relaxed_iterations: int = 18
    updates: int = 14
    judged: int = 2
    pool: int = 12
    heldout: int = 4
    distill_images: int = 12
    distill_updates: int = 16


def main() -> None:
    """Run or resume the comparison of one student, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="near_far", help="a student preset")
    parser.add_argument("--name", help="what the comparison is called in the file; the preset if left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the preset (JSON)")
    parser.add_argument(
        "--student-cost", type=float, help="cost of a student slot relative to a full one; operations if left out"
    )
    parser.add_argument(
        "--side", type=int, default=32, help="image tokens per row and column; a student too dear there needs more"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--readme", action="store_true", help="print the tables of --out and run nothing")
    arguments = parser.parse_args()
    if arguments.readme:
        print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Compare one student, seed by seed."""
    torch.set_num_threads(1)
    amounts = Amounts()
    sampler = DifferentiableTinySampler(
        load_teacher(),
        rows=arguments.side,
        columns=arguments.side,
        steps=arguments.steps,
        guidance=arguments.guidance,
    )
    overrides = {name: json.loads(value) for name, _, value in (item.partition("=") for item in arguments.set)}
    config = preset(arguments.student, **overrides)
    bank, learned = students(sampler, config, amounts)
    data = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else new_file()
    entry = data["students"].setdefault(
        arguments.name or arguments.student,
        {
            "settings": config.to_dict(),
            "distilled_images": amounts.distill_images if learned else 0,
            "distilled_updates": learned,
            "student_cost": student_cost(sampler, bank) if arguments.student_cost is None else arguments.student_cost,
            "student_operations": student_cost(sampler, bank),
            "tokens": arguments.side**2,
            "steps": arguments.steps,
            "guidance": arguments.guidance,
            "amounts": vars(amounts),
            "seeds": {},
        },
    )
    for seed in range(arguments.seeds):
        if str(seed) in entry["seeds"]:
            continue
        start = time.process_time()
        rows = compare(sampler, StudentBackend(bank), entry["student_cost"], amounts, seed)
        entry["seeds"][str(seed)] = {"rows": rows, "cpu_seconds": time.process_time() - start}
        data["summary"] = {name: gains(summary(one), smoke(one)) for name, one in data["students"].items()}
        write_atomically(arguments.out, (json.dumps(data, indent=1) + "\n").encode())
        print(markdown(data), flush=True)


def new_file() -> dict[str, dict[str, object]]:
    """An empty results file."""
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": 1,
        "costs": list(COSTS),
        "error": "relative RMSE of the final latent on held-out images; random is the mean of three masks a seed",
        "lpips": "smoke figure on the same images: squeeze backbone with random weights",
    }
    return {"facts": facts, "students": {}}


def images(prompts: Sequence[str], first: int, count: int, noise: int) -> Images:
    """Prompts from number ``first`` on, round and round, with noise seeds from ``noise`` on."""
    return [prompts[(first + i) % len(prompts)] for i in range(count)], [noise + i for i in range(count)]


def students(sampler: DifferentiableTinySampler, config: StudentConfig, amounts: Amounts) -> tuple[StudentBank, int]:
    """Students for every layer, distilled unless they are of use without training; the updates of a layer."""
    bank = StudentBank.for_layers(config, sampler.layers, sampler.heads, sampler.width)
    if bank[sampler.layers[0]].training_free:
        return bank, 0
    settings = DistillConfig(min_swap_layers=len(sampler.layers), train_steps_per_call=amounts.distill_updates)
    distiller = Distiller(bank, ReadinessTracker(), settings, seed=0)
    prompts, seeds = images(training_prompts(), 0, amounts.distill_images, 9_000)
    for prompt, seed in zip(prompts, seeds, strict=True):
        sampler.sample([prompt], [seed], distiller)
        distiller.raise_pending()
    distiller.finish()
    return bank, distiller.updates // len(bank)


def student_cost(sampler: DifferentiableTinySampler, bank: StudentBank) -> float:
    """Operations of the students relative to exact attention, mean over the layers."""
    grid = TokenGrid(sampler.text_tokens, sampler.rows, sampler.columns)
    layout = TokenLayout(grid.stop, ((0, sampler.text_tokens),), (grid,))
    exact = exact_flops(1, sampler.heads, layout.length, layout.length, sampler.width, sampler.width)
    each = [bank[layer].flops(layout, 1, sampler.heads, sampler.width) / exact for layer in sampler.layers]
    return sum(each) / len(each)


def compare(
    sampler: DifferentiableTinySampler,
    backend: StudentBackend,
    cost: float,
    amounts: Amounts,
    seed: int,
) -> list[dict[str, object]]:
    """Learn by every method on this seed's training images and judge all masks on its held-out images."""
    shares = [(level - cost) / (1.0 - cost) for level in COSTS]
    steps, layers = sampler.steps, len(sampler.layers)
    counts = [min(steps * layers, max(0, round(share * steps * layers))) for share in shares]
    rankings = rank(sampler, backend, cost, amounts, seed, [count / (steps * layers) for count in counts])
    judge, lpips = Judge(sampler, backend), LpipsDistance("squeeze", random_backbone=True)
    heldout = images(heldout_prompts(), seed * amounts.heldout, amounts.heldout, 50_000 + 100 * seed)

    def measured(method: str, level: float, rollouts: float, mask: Tensor) -> dict[str, object]:
        teacher = judge.teacher.get(*heldout)
        made = sampler.sample(*heldout, judge.router(ScheduleGuard(mask, sampler.layers)))
        share = budget.full_share(mask)
        return {
            "method": method,
            "level": level,
            "cost": share + (1.0 - share) * cost,
            "full_share": share,
            "rollouts": rollouts,
            "errors": rounded(relative_rmse(made.latent, teacher.latent)),
            "lpips": rounded(lpips(made.images, teacher.images)),
            "mask": ["".join("F" if full else "." for full in step) for step in mask.tolist()],
        }

    rows = [measured("all student", 0.0, 0.0, budget.all_student(steps, layers))]
    for level, count in zip(COSTS, counts, strict=True):
        masks: list[tuple[str, Tensor, float]] = []
        for draw in range(RANDOM_DRAWS):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            rules = simple_rules(steps, layers, count, generator)
            masks += [(name, mask, 0.0) for name, mask in rules.items() if draw == 0 or name == "random"]
        masks += [(one.method, budget.top_k_mask(one.scores, count), one.rollouts) for one in rankings]
        rows += [measured(name, level, rollouts, mask) for name, mask, rollouts in masks]
    return rows


def rounded(values: Tensor) -> list[float]:
    """Figures for the results file."""
    return [round(value, 6) for value in values.detach().double().tolist()]


def rank(
    sampler: DifferentiableTinySampler,
    backend: StudentBackend,
    cost: float,
    amounts: Amounts,
    seed: int,
    shares: list[float],
) -> list[Ranking]:
    """Rankings of all methods; relaxed gates go on from flips, REINFORCE from the probe."""
    prompts, noise = training_prompts(), 10_000 + 1_000 * seed
    probed = images(prompts, 5 * seed, amounts.probe_images, noise)
    judged = images(prompts, 5 * seed + amounts.probe_images, amounts.judged, noise + 100)
    pool = images(prompts, 5 * seed + 4, amounts.pool, noise + 200)
    usable = tuple(share for share in shares if 0.0 < share < 1.0)
    if not usable:
        raise ValueError("the student is too dear at this size for any of the compared costs; give --student-cost 0")
    costs = AttentionCosts.of_student([cost] * len(sampler.layers))
    found = [rank_by_layer_error(sampler, probed, backend), rank_by_budget(sampler, probed, backend, costs)]
    found.append(rank_by_pairs(sampler, images(prompts, 5 * seed, amounts.pair_images, noise), backend, usable))
    path = sampler.trajectory(*probed)
    probe = rank_by_probe(sampler, probed, backend, path=path)
    flips = rank_by_flips(sampler, probed, backend, path=path)
    found += [probe, flips]
    gates = RelaxedConfig(iterations=amounts.relaxed_iterations, shares=usable)
    found.append(rank_by_relaxed_gates(sampler, pool, backend, flips, gates, seed=seed))
    config = ControllerConfig(target_full=shares[1] if shares[1] in usable else usable[-1], learning_rate=2e-3)
    policy = PolicyConfig(pixels_per_latent=4.0)
    found.append(
        rank_by_reinforce(sampler, pool, judged, backend, probe, config, amounts.updates, seed=seed, policy=policy)
    )
    return found


def summary(entry: dict[str, dict[str, dict[str, list[dict[str, object]]]]]) -> dict[tuple[str, float], list[float]]:
    """Mean held-out error of each seed, by method and cost level."""
    found: dict[tuple[str, float], list[float]] = {}
    for seed in entry["seeds"].values():
        own: dict[tuple[str, float], list[float]] = {}
        for line in seed["rows"]:
            errors = line["errors"]
            assert isinstance(errors, list)
            own.setdefault((str(line["method"]), float(str(line["level"]))), []).extend(errors)
        for key, values in own.items():
            found.setdefault(key, []).append(sum(values) / len(values))
    return found


def smoke(entry: dict[str, dict[str, dict[str, list[dict[str, object]]]]]) -> dict[str, float]:
    """Mean LPIPS with random squeeze weights by method at ``SMOKE_LEVEL``, where it was measured."""
    found: dict[str, list[float]] = {}
    for seed in entry["seeds"].values():
        for line in seed["rows"]:
            values = line.get("lpips", [])
            assert isinstance(values, list)
            if line["level"] == SMOKE_LEVEL:
                found.setdefault(str(line["method"]), []).extend(values)
    return {method: sum(values) / len(values) for method, values in found.items() if values}


def gains(
    found: dict[tuple[str, float], list[float]], pictures: dict[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard error, and by which share the mean is below the best rule without rollouts and below random."""
    means = {key: mean_and_error(values) for key, values in found.items()}
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (method, level), (mean, error) in means.items():
        if method == "all student":
            continue
        best = min(means[rule, level][0] for rule in ZERO_ROLLOUT)
        table.setdefault(method, {})[str(level)] = {
            "mean": round(mean, 5),
            "standard_error": round(error, 5) if math.isfinite(error) else 0.0,
            "below_best_rule": round(1 - mean / best, 4),
            "below_random": round(1 - mean / means["random", level][0], 4),
        } | ({"lpips": round(pictures[method], 5)} if level == SMOKE_LEVEL and method in pictures else {})
    return table


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def markdown(data: dict[str, dict[str, dict[str, object]]]) -> str:
    """The tables of a results file."""
    lines: list[str] = []
    for name, entry in data["students"].items():
        found = summary(entry)  # type: ignore[arg-type]
        methods = [method for method in ORDER if any(name == method for name, _ in found)]
        count = len(next(iter(found.values())))
        rollouts = {
            line["method"]: line["rollouts"]
            for seed in entry["seeds"].values()  # type: ignore[attr-defined]
            for line in seed["rows"]
        }
        everywhere, _ = mean_and_error(found["all student", 0.0])
        lines += [
            f"`{name}`, {entry['tokens']} tokens, {entry['steps']} steps, {count} seeds; a student's attention counts "
            f"{float(str(entry['student_cost'])):.2f} of full attention; students everywhere err by {everywhere:.3f}:",
            "",
            "| method | rollouts | "
            + " | ".join(f"at {100 * level:.0f} % cost" for level in COSTS)
            + f" | LPIPS with random squeeze weights (smoke) at {100 * SMOKE_LEVEL:.0f} % |",
            "|---|---|" + "---|" * (len(COSTS) + 1),
        ]
        pictures = smoke(entry)  # type: ignore[arg-type]
        for method in methods:
            cells = ["{:.4f} ± {:.4f}".format(*mean_and_error(found[method, level])) for level in COSTS]
            cells.append(f"{pictures[method]:.4f}" if method in pictures else "-")
            lines.append(
                f"| {LABELS.get(method, method)} | {float(rollouts[method]):.0f} | " + " | ".join(cells) + " |"
            )
        for method, levels in gains(found, pictures).items():
            if method in ("flips", "pairs", "relaxed"):
                each = [
                    f"at {100 * float(level):.0f} % {100 * one['below_best_rule']:.0f} % below the best rule and "
                    f"{100 * one['below_random']:.0f} % below random"
                    for level, one in levels.items()
                ]
                lines += ["", f"{method}: " + "; ".join(each)]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
