"""The results of a run, ``results.json``, read into typed values and checked.

The file is written phase by phase: a phase that has not run yet is absent and reads as ``None``. A number that is
missing, ``null``, ``NaN`` or infinite reads as ``None``, which the page shows as a dash. Whatever the file holds beyond
the fields below is named in ``Results.unread``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ttr_controller.report.decode import ResultsError as ResultsError
from ttr_controller.report.decode import decode_object, describe, finite_or_none

SCHEMA = 1
RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Machine:
    """Where the run took place; ``threads`` is the number of CPU threads that torch used."""

    cpu: str | None = None
    threads: int | None = None
    device: str | None = None
    system: str | None = None
    python: str | None = None
    torch: str | None = None
    diffusers: str | None = None


@dataclass(frozen=True)
class Teacher:
    """The embedded teacher and how it sampled; ``tokens`` counts image tokens, ``width`` is per head."""

    layers: tuple[str, ...]
    parameters: int | None = None
    heads: int | None = None
    width: int | None = None
    tokens: int | None = None
    text_tokens: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class FidelityRow:
    """Distance of one layer's student from the teacher; ``when`` is ``"before"`` or ``"after"`` training."""

    layer: str
    variant: str
    when: str
    cosine_distance: float | None = None
    relative_l2: float | None = None
    ready: bool | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        if self.when not in ("before", "after"):
            raise ResultsError(f'"when" must be "before" or "after", got {self.when!r}')


@dataclass(frozen=True)
class Fidelity:
    """Per-layer distances on held-out prompts at one number of image tokens."""

    rows: tuple[FidelityRow, ...]
    tokens: int | None = None
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """Training curve of one layer's student."""

    layer: str
    update: tuple[int, ...]
    loss: tuple[float | None, ...] = ()
    cosine_distance: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("loss", self.loss), ("cosine_distance", self.cosine_distance)):
            if values and len(values) != len(self.update):
                raise ResultsError(f"{name} has {len(values)} values for {len(self.update)} updates")


@dataclass(frozen=True)
class Distillation:
    """Phase 1: how the students were trained; ``kept_learned`` says whose learned form serves, by layer."""

    curves: tuple[Curve, ...] = ()
    updates: int | None = None
    images: int | None = None
    kept_learned: dict[str, bool] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class ControllerPoint:
    """State of the policy after ``rollouts`` sampled pictures.

    ``quality`` and ``validation`` are errors of the pictures or their negatives; ``picture_error`` and
    ``validation_error`` are the errors.
    """

    rollouts: int
    reward: float | None = None
    quality: float | None = None
    cost: float | None = None
    validation: float | None = None

    @property
    def picture_error(self) -> float | None:
        """Error of the rollouts' pictures; less is better."""
        return None if self.quality is None else abs(self.quality)

    @property
    def validation_error(self) -> float | None:
        """Error on the validation prompts; less is better."""
        return None if self.validation is None else abs(self.validation)


@dataclass(frozen=True)
class Heatmap:
    """Probability of full attention, ``[steps][layers]``, and the noise level of each step."""

    layers: tuple[str, ...]
    sigmas: tuple[float, ...]
    full_probability: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        if len(self.full_probability) != len(self.sigmas):
            raise ResultsError(f"full_probability has {len(self.full_probability)} steps for {len(self.sigmas)} sigmas")
        for step, row in enumerate(self.full_probability):
            if len(row) != len(self.layers):
                raise ResultsError(f"full_probability[{step}] has {len(row)} values for {len(self.layers)} layers")
            if any(value is not None and not 0 <= value <= 1 for value in row):
                raise ResultsError(f"full_probability[{step}] holds a value outside 0..1")


@dataclass(frozen=True)
class Controller:
    """Phase 2: how the policy was learnt and what it chose; it aims at a share ``target_full`` of full attention."""

    method: str | None = None
    rollouts: int | None = None
    target_full: float | None = None
    curve: tuple[ControllerPoint, ...] = ()
    heatmap: Heatmap | None = None


@dataclass(frozen=True)
class ParetoPoint:
    """One way of routing, sampled and compared with the teacher.

    ``cost`` is attention FLOPs relative to full attention everywhere, ``full_share`` the share of (step, layer) slots
    at full attention, ``latent_rmse`` relative to the teacher's latent (the mean of ``latent_rmse_by_prompt``),
    ``psnr`` in dB.
    """

    method: str
    cost: float
    full_share: float | None = None
    latent_rmse: float | None = None
    latent_rmse_se: float | None = None
    latent_rmse_by_prompt: tuple[float | None, ...] = ()
    psnr: float | None = None
    ssim: float | None = None
    retrieval: float | None = None
    attention_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Pareto:
    """Quality against cost on held-out prompts.

    ``student_cost`` is the cost of students everywhere; ``not_run`` says of methods that are missing why they are.
    """

    points: tuple[ParetoPoint, ...]
    prompts: tuple[str, ...] = ()
    student_cost: float | None = None
    teacher_retrieval: float | None = None
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class SheetColumn:
    """One setting's pictures, one file per prompt, paths relative to the run's folder."""

    label: str
    images: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True)
class Sheet:
    """The same prompts and seeds at several settings."""

    prompts: tuple[str, ...]
    columns: tuple[SheetColumn, ...]

    def __post_init__(self) -> None:
        for column in self.columns:
            if len(column.images) != len(self.prompts):
                raise ResultsError(
                    f"column {column.label!r} has {len(column.images)} images for {len(self.prompts)} prompts"
                )


@dataclass(frozen=True)
class TimingRow:
    """Time of one attention variant at one number of image tokens; ``attention_ms_spread`` is lowest and highest."""

    tokens: int
    variant: str
    attention_ms: float | None = None
    step_ms: float | None = None
    attention_ms_spread: tuple[float, ...] | None = None


@dataclass(frozen=True)
class BreakEven:
    """Image tokens from which a variant is faster than exact attention; ``None`` if not reached."""

    attention_tokens: float | None = None
    step_tokens: float | None = None


@dataclass(frozen=True)
class Timing:
    """Attention and whole-step times on the run's machine."""

    rows: tuple[TimingRow, ...]
    threads: int | None = None
    break_even: dict[str, BreakEven] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """What was asked of the run, what was measured, and whether it holds (``None``: not measured)."""

    name: str
    value: bool | float | str | None = None
    limit: bool | float | str | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Results:
    """Everything a run has written so far."""

    schema: int
    preset: str
    seed: int | None = None
    created: str | None = None
    complete: bool = False
    budget_minutes: float | None = None
    settings: dict[str, bool | float | tuple[float, ...] | str | None] = dataclasses.field(default_factory=dict)
    plan: dict[str, float | None] = dataclasses.field(default_factory=dict)
    machine: Machine = Machine()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float | None] = dataclasses.field(default_factory=dict)
    teacher: Teacher | None = None
    fidelity: Fidelity | None = None
    distillation: Distillation | None = None
    controller: Controller | None = None
    pareto: Pareto | None = None
    sheet: Sheet | None = None
    timing: Timing | None = None
    checks: tuple[Check, ...] = ()
    unread: tuple[str, ...] = ()


def load_results(run_dir: Path) -> Results:
    """Read and check ``run_dir/results.json``.

    Args:
        run_dir: Folder of a run.

    Returns:
        The typed results.

    Raises:
        ResultsError: The file is missing, unreadable, not JSON, of another schema, or a field has the wrong type.
    """
    path = run_dir / RESULTS_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"no {RESULTS_NAME} in {run_dir}: name the folder of a run, or start one first") from None
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path} is not a text file: run again to write it anew") from None
    try:
        data = json.loads(text, parse_float=finite_or_none, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ResultsError(f"{path} is broken or cut short ({reason}): run again to write it anew") from None
    if not isinstance(data, dict):
        raise ResultsError(f"{path} must hold a JSON object, got {describe(data)}")
    if data.get("schema") != SCHEMA:
        raise ResultsError(f"{path} has schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
    unread: list[str] = []
    try:
        results = decode_object(Results, {**data, "unread": ()}, "", unread)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    return dataclasses.replace(results, unread=tuple(dict.fromkeys(unread)))
