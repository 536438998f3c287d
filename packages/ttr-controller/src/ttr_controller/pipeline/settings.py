"""What a quickstart run is asked for, and how much work fits its time budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
from ttr_distill.student import PRESETS

DEFAULT_BUDGET_MINUTES = 3.5

_SHARES = MappingProxyType(
    {"distill": 0.12, "fidelity": 0.08, "pairs": 0.20, "validation": 0.22, "rollouts": 0.06, "compare": 0.32}
)
"""How the time that is left after loading and timing is shared out."""

_FIXED_SECONDS = 30.0
"""Loading, timing and the report."""


class RunError(ValueError):
    """A run cannot go on for a reason that its user can mend; the message is one clear line."""


@dataclass(frozen=True)
class QuickstartSettings:
    """The choices of one run; a run directory keeps them, and a resumed run must repeat them.

    Attributes:
        preset: Student preset.
        device: Torch device, ``"auto"`` resolved by ``resolve_device``.
        budget_minutes: Wall time the run should take.
        seed: Seed of every random draw.
        rows: Image tokens per column; 32 means 128 x 128 pixels.
        columns: Image tokens per row.
        steps: Euler steps of a sample.
        guidance: Classifier-free guidance scale.
        timing_sides: Image tokens per row and column at which times are measured, ascending.
    """

    preset: str = "near_far"
    device: str = "cpu"
    budget_minutes: float = DEFAULT_BUDGET_MINUTES
    seed: int = 0
    rows: int = 32
    columns: int = 32
    steps: int = 8
    guidance: float = 3.0
    timing_sides: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "timing_sides", tuple(self.timing_sides))  # JSON gives a list
        if self.preset not in PRESETS:
            raise RunError(f"unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}")
        if not 0.1 <= self.budget_minutes <= 600:
            raise RunError(f"the budget must be between 0.1 and 600 minutes, got {self.budget_minutes}")
        if min(self.rows, self.columns) < 8 or self.steps < 2:
            raise RunError(
                f"at least 8 x 8 tokens and 2 steps are needed, got {self.rows} x {self.columns}, {self.steps}"
            )
        if not 0 <= self.seed < 2**63:
            raise RunError(f"the seed must be between 0 and 2**63 - 1, got {self.seed}")

    def differences(self, other: QuickstartSettings) -> list[str]:
        """Settings that differ, as ``name: mine, theirs``; the budget may differ, the work is planned once."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name}: {mine[name]} here, {theirs[name]} in the run"
            for name in mine
            if name != "budget_minutes" and mine[name] != theirs[name]
        ]


def resolve_device(name: str) -> str:
    """Resolve ``"auto"`` to ``"cuda"`` where a GPU is usable, else ``"cpu"``; check any other name.

    Raises:
        RunError: The device is unknown or not present.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"unknown device {name!r}; try auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError("no CUDA device is usable here; use --device cpu or --device auto")
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"the quickstart runs on cpu or cuda, not on {name!r}")
    return str(device)


@dataclass(frozen=True)
class Plan:
    """How much of each phase is done; fixed when a run starts, so that a resumed run ends as an unbroken one.

    Attributes:
        distill_images: Teacher images that Phase 1 learns from.
        fidelity_prompts: Held-out prompts on which attention is compared layer by layer.
        probe_prompts: Training prompts of the probes.
        validation_prompts: Training prompts on which masks are compared.
        rollouts: Student images that Phase 2 learns from.
        compare_prompts: Held-out prompts of the comparison and the picture sheet.
        levels: Costs at which routing is compared.
        timing_repeats: Repeats of each timing; the median is reported.
    """

    distill_images: int
    fidelity_prompts: int
    probe_prompts: int
    validation_prompts: int
    rollouts: int
    compare_prompts: int
    levels: int
    timing_repeats: int

    @classmethod
    def from_mapping(cls, values: Mapping[str, int]) -> Plan:
        """Read a plan back from a run directory."""
        return cls(**{name: int(values[name]) for name in cls.__dataclass_fields__})


def make_plan(settings: QuickstartSettings, layers: int, forward: float, student: float) -> Plan:
    """Fit the amounts of work to the budget on this machine.

    Args:
        settings: The run's settings.
        layers: Attention layers of the model.
        forward: Seconds of one guided forward with exact attention at the run's size.
        student: The same with the student in every layer.

    Returns:
        The plan; every amount has a floor below which its figures would mean nothing, so that a very small budget is
        exceeded.
    """
    steps = settings.steps
    seconds = max(0.0, 60.0 * settings.budget_minutes - _FIXED_SECONDS)
    extra = max(student - forward, 0.05 * forward)
    image, student_image = steps * forward, steps * max(student, forward)
    # Each slot is evaluated alone, and changed once more and followed to the end of sampling.
    pairs = steps * layers * (1 + (steps + 1) / 2) * student + image
    # An update sees all keys but few queries, forwards and back: for near-far, with what is measured on
    # held-out queries, about half of a forward.
    distill = image + steps * layers * 0.5 * forward + 1.5 * steps * extra
    slowdown = student_image / image

    def amount(phase: str, each: float, least: int, most: int) -> int:
        return max(least, min(most, int(_SHARES[phase] * seconds / each)))

    levels = (3 if settings.budget_minutes >= 6.0 else 2) if slowdown < 2.0 and settings.budget_minutes >= 1.0 else 1
    return Plan(
        distill_images=amount("distill", distill, 3, 24),
        fidelity_prompts=amount("fidelity", 2.7 * image + 3 * steps * extra, 1, 8),
        probe_prompts=amount("pairs", pairs, 1, 4),
        # Five rankings at each cost, and what is learnt from there.
        validation_prompts=amount("validation", (4 + 5 * levels) * student_image, 2, 4),
        rollouts=amount("rollouts", student_image, 0, 512) // 4 * 4,
        compare_prompts=amount("compare", (2 + 9 * levels) * 0.5 * (image + student_image), 2, 12),
        levels=levels,
        timing_repeats=3 if slowdown > 2.0 or settings.budget_minutes < 2.0 else 5,
    )
