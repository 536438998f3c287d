"""How close each layer's student is to the teacher's attention on held-out prompts, before and after distillation."""

from __future__ import annotations

import time

import torch
from attn_dispatch import AttentionCall, LayerKey, NativeAttention
from attn_kernels import cosine_distance
from torch import Tensor
from ttr_distill.student import StudentBank, preset

from ttr_controller.pipeline.workbench import Students, Tick, Workbench

PLAIN = "near_far, no chosen tiles"
PLAIN_SMALL = "near_far, no chosen tiles, tiles of 2 x 2"
"""At this size small tiles see fewer keys than tiles of 4 x 4 with chosen ones."""

NEAR_FAR_LIMIT = 0.005
CHOSEN_TILES_LIMIT = 0.002


class StudentMeter:
    """Attention handler that returns the teacher's output and measures students on the same calls, all queries.

    Args:
        banks: Students to measure, by a name.
    """

    def __init__(self, banks: dict[str, StudentBank]) -> None:
        self.banks = banks
        self._sums: dict[tuple[str, LayerKey], list[Tensor]] = {}

    def begin_run(self) -> None:
        """Nothing to prepare."""

    def end_run(self) -> None:
        """Nothing to finish."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer with ``native(call)``; measure every student of this layer."""
        teacher = native(call)
        assert call.layer is not None
        for name, bank in self.banks.items():
            with torch.no_grad():
                student = bank[call.layer](call)
            error = (student.float() - teacher.float()).square().sum()
            energy = teacher.float().square().sum()
            distance = cosine_distance(student, teacher).mean()
            measured = torch.stack([distance, error, energy, torch.ones_like(error)])
            self._sums.setdefault((name, call.layer), []).append(measured)
        return teacher

    def rows(self) -> dict[tuple[str, LayerKey], tuple[float, float]]:
        """Mean cosine distance and relative L2 error by name and layer."""
        result = {}
        for key, parts in self._sums.items():
            cosine, error, energy, count = torch.stack(parts).double().sum(dim=0).tolist()
            result[key] = (cosine / count, (error / energy) ** 0.5)
        return result


def measure_fidelity(bench: Workbench, students: Students, tick: Tick) -> None:
    """Measure untrained and trained students and near-far without training, and record the section ``fidelity``."""
    start = time.perf_counter()
    plan = bench.plan()
    preset_name = bench.run.settings.preset
    variants = {
        (PLAIN, "before"): bench.new_bank(preset("near_far", top_k=0)),
        (PLAIN_SMALL, "before"): bench.new_bank(preset("near_far", top_k=0, tile=2)),
        ("near_far", "before"): bench.new_bank(preset("near_far")),
        (preset_name, "after"): students.bank,
    }
    if preset_name != "near_far":
        variants[(preset_name, "before")] = bench.new_bank()
    meter = StudentMeter({" | ".join(key): bank for key, bank in variants.items()})
    prompts, seeds = bench.heldout_set(plan.fidelity_prompts)
    for prompt, seed in zip(prompts, seeds, strict=True):
        bench.sampler.sample([prompt], [seed], meter)
        tick(3.0)
    rows = []
    for (name, layer), (cosine, relative) in meter.rows().items():
        variant, _, when = name.partition(" | ")
        row: dict[str, object] = {
            "layer": str(layer),
            "variant": variant,
            "when": when,
            "cosine_distance": cosine,
            "relative_l2": relative,
        }
        if when == "after":
            row["ready"] = students.readiness.ready(layer)
            row["updates"] = students.readiness[layer].updates
        rows.append(row)
    tokens = bench.run.settings.rows * bench.run.settings.columns
    bench.run.record("fidelity", {"tokens": tokens, "prompts": prompts, "rows": rows}, time.perf_counter() - start)


def worst_cosine_distance(rows: list[dict[str, object]], variant: str, when: str) -> float:
    """Largest over the layers of one variant's cosine distance."""
    return max(_cosine_distances(rows, variant, when))


def mean_cosine_distance(rows: list[dict[str, object]], variant: str, when: str) -> float:
    """Mean over the layers of one variant's cosine distance."""
    values = _cosine_distances(rows, variant, when)
    return sum(values) / len(values)


def _cosine_distances(rows: list[dict[str, object]], variant: str, when: str) -> list[float]:
    return [float(str(row["cosine_distance"])) for row in rows if (row["variant"], row["when"]) == (variant, when)]
