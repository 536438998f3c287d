"""What each attention costs in each layer, modelled or measured, and what a choice of them costs in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

import torch
from attn_dispatch.call import LayerKey
from attn_dispatch.report import DispatchReport
from attn_dispatch.router import AttentionRouter, Backend, Route
from torch import Tensor

from ttr_controller.rollout import Sampler

FULL = "full"
"""Name of the host's own attention among the actions; always number 0."""


@dataclass(frozen=True, eq=False)
class AttentionCosts:
    """Cost of every attention that a layer may choose.

    Attributes:
        names: The actions: ``"full"`` first, then the names of the backends.
        table: ``[L, A]`` float64, positive, in any unit: milliseconds where measured, operations where modelled.
    """

    names: tuple[str, ...]
    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[1] != len(self.names) or self.names[0] != FULL:
            raise ValueError(f"table must be [L, {len(self.names)}] and the first action {FULL!r}, got {self.names}")
        if not bool(((self.table > 0) & self.table.isfinite()).all()):
            raise ValueError("costs must be positive and finite")
        object.__setattr__(self, "table", self.table.double())

    @classmethod
    def of_student(cls, student_cost: Tensor | Sequence[float], name: str = "student") -> AttentionCosts:
        """Costs of one student per layer, ``[L]`` relative to full attention, which costs 1 in every layer."""
        relative = torch.as_tensor(student_cost, dtype=torch.float64)
        return cls((FULL, name), torch.stack([torch.ones_like(relative), relative.clamp_min(1e-9)], dim=1))

    def total(self, choices: Tensor, *, eligible: Tensor | None = None) -> float:
        """Cost of a choice ``[steps, L]`` relative to full attention in the same slots.

        Args:
            choices: int64 number of the attention of each slot, or bool with True = full.
            eligible: ``[L]`` bool; slots of other layers are left out. ``None``: all layers count.

        Raises:
            ValueError: Shapes differ, or no layer is eligible.
        """
        picks = as_choices(choices)
        if picks.ndim != 2 or picks.shape[1] != self.table.shape[0]:
            raise ValueError(f"choices must be [steps, {self.table.shape[0]}], got {tuple(picks.shape)}")
        keep = torch.ones(self.table.shape[0], dtype=torch.bool) if eligible is None else eligible
        if not bool(keep.any()):
            raise ValueError("no layer is eligible: the relative cost is undefined")
        spent = self.table.gather(1, picks.T).sum(dim=1)  # [L]
        return float(spent[keep].sum() / (picks.shape[0] * self.table[keep, 0].sum()))

    def cheapest(self, *, eligible: Tensor | None = None) -> float:
        """Relative cost with the cheapest attention in every eligible layer (``[L]`` bool; ``None``: all)."""
        keep = torch.ones(self.table.shape[0], dtype=torch.bool) if eligible is None else eligible
        return float(self.table[keep].amin(dim=1).sum() / self.table[keep, 0].sum())

    def share_for(self, relative_cost: float, *, eligible: Tensor | None = None) -> float:
        """Share of full attention, 0 to 1, at which full and cheapest attention together cost this much.

        Args:
            relative_cost: Wanted cost relative to full attention in all eligible slots.
            eligible: ``[L]`` bool; ``None``: all layers count.
        """
        low = self.cheapest(eligible=eligible)
        if low >= 1.0:
            return 1.0
        return min(1.0, max(0.0, (relative_cost - low) / (1.0 - low)))


def as_choices(mask: Tensor) -> Tensor:
    """Choices ``[..., L]`` int64 of a mask: a bool mask has True = full (0) and False = the first alternative (1)."""
    return (~mask).long() if mask.dtype is torch.bool else mask.long()


def measure_costs(
    sampler: Sampler, backends: Sequence[Backend], prompts: Sequence[str], seeds: Sequence[int], *, repeats: int = 3
) -> AttentionCosts:
    """Measure the milliseconds of full attention and of every backend, per layer, on real calls of the sampler.

    Each attention answers whole sampling runs alone; a layer's cost is the median over the runs and steps of the mean
    time of a call. Where a backend refuses, the layer's full attention counts.

    Args:
        sampler: Makes images.
        backends: What may stand in for full attention.
        prompts: One per image.
        seeds: One per image.
        repeats: Runs of each attention; they take turns, so that a busy moment of the machine hits all.
    """
    routers = [AttentionRouter(())] + [AttentionRouter((Route(backend),)) for backend in backends]
    times: list[dict[LayerKey, list[float]]] = [{layer: [] for layer in sampler.layers} for _ in routers]
    for _ in range(repeats):
        for number, router in enumerate(routers):
            router.report.clear()
            sampler.sample(prompts, seeds, router)
            for layer, each in _call_times(router.report).items():
                if layer in times[number]:
                    times[number][layer].extend(each)
    table = [[median(times[number][layer]) for number in range(len(routers))] for layer in sampler.layers]
    return AttentionCosts((FULL, *(backend.name for backend in backends)), torch.tensor(table, dtype=torch.float64))


def _call_times(report: DispatchReport) -> dict[LayerKey, list[float]]:
    """Milliseconds of a call in each layer, one entry per noise level."""
    rows = sorted((row for row in report.rows() if row.layer is not None), key=lambda row: str(row.layer))
    found: dict[LayerKey, list[float]] = {}
    for layer, own in groupby(rows, key=lambda row: row.layer):
        if layer is not None:
            found[layer] = [row.milliseconds / row.count for row in own]
    return found
