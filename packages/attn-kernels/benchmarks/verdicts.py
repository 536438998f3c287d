"""What a run says: whether the promised ratios hold, and whether the cost model foretells them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from attn_kernels.cost import AttentionShape, exact_work
from attn_kernels.device_model import DeviceModel, Timing, Work


class Bar(NamedTuple):
    """A promised ratio.

    Attributes:
        operators: Beginnings of names; the fastest counts.
        scene: Beginning of the scene's name.
        image: Image tokens.
        least: Times as fast as the fastest exact attention of the run.
        device: Where it was promised.
    """

    operators: tuple[str, ...]
    scene: str
    image: int
    least: float
    device: str = "cpu"


BARS = (
    Bar(("taylor 4",), "width 16", 16384, 10.0),
    Bar(("taylor 4",), "width 16", 4096, 2.5),
    Bar(("taylor 3",), "width 16", 4096, 10.0),
    Bar(("near-far",), "width 128", 16384, 9.0),
    Bar(("near-far",), "width 128", 4096, 3.5),
    Bar(("mlp map",), "width 128", 4096, 1 / 1.1),
    Bar(("mlp map bf16",), "width 128", 4096, 1 / 0.7),
    Bar(("near-far",), "Flux", 16384, 5.0, "cuda"),
    Bar(("near-far",), "Flux", 65536, 15.0, "cuda"),
    Bar(("taylor 3",), "Flux", 16384, 20.0, "cuda"),
    Bar(("taylor 4",), "Flux", 16384, 5.0, "cuda"),
)


@dataclass(frozen=True)
class Row:
    """One operator on one scene; times in milliseconds, memory in MiB, ``tflops`` = 1e12 operations per second."""

    scene: str
    operator: str
    tokens: int
    image: int
    heads: int
    width: int
    dtype: str
    keys: float
    milliseconds: float
    speed_up: float
    tflops: float
    extra_memory: float
    error_to_specification: float
    relative_l2: float
    cosine_distance: float
    cosine_p99: float


class Measured(NamedTuple):
    """A row with what the cost model is told about it."""

    row: Row
    shape: AttentionShape
    work: Work

    @property
    def timing(self) -> Timing:
        """For ``DeviceModel.calibrate``."""
        return Timing(self.work, getattr(torch, self.row.dtype), self.row.milliseconds / 1e3)


def check_bars(rows: Sequence[Row], device: str) -> list[dict[str, object]]:
    """Compare the promised ratios with those of the run; a ratio whose sizes were not run is left out."""
    found: list[dict[str, object]] = []
    for bar in (bar for bar in BARS if bar.device == device):
        # A bar's own name wins over names that begin with it.
        fits = [
            r for r in rows if r.scene == bar.scene and r.image == bar.image and r.operator.startswith(bar.operators)
        ]
        fits = [r for r in fits if r.operator in bar.operators] or fits
        if fits:
            best = max(fits, key=lambda row: row.speed_up)
            verdict = {"measured": best.speed_up, "operator": best.operator, "met": best.speed_up >= bar.least}
            found.append({**bar._asdict(), **verdict})
    return found


@dataclass(frozen=True)
class BreakEven:
    """Number of tokens from which an operator is faster than exact attention; NaN = not within what was measured.

    Attributes:
        scene: Name of the scenes.
        operator: Name of the operator.
        most: Most tokens measured.
        measured: Where the measured times cross, on straight lines between logarithms.
        calibrated: Where those of a model cross that was fitted to every other size of this run.
        stored: Where those of the stored model cross.
        error: Largest ratio of predicted to measured time, or its inverse, at the sizes that were left out.
    """

    scene: str
    operator: str
    most: int
    measured: float
    calibrated: float
    stored: float
    error: float

    @property
    def agrees(self) -> bool:
        """Whether the fitted model's crossing is within a factor of 1.5 of the measured one.

        One that lies beyond the most tokens counts as lying there.
        """
        measured, calibrated = (self.most if x != x else x for x in (self.measured, self.calibrated))
        return 1 / 1.5 <= calibrated / measured <= 1.5


def check_model(found: Sequence[Measured], stored: DeviceModel) -> tuple[DeviceModel, list[BreakEven]]:
    """Fit the cost model to every other size and compare what it foretells with all of them.

    Args:
        found: Measured calls, exact attention among them under the operator ``"exact"``.
        stored: Model of the device as it is shipped.

    Returns:
        The model fitted to all sizes, and one comparison per scene and operator with at least three sizes.
    """
    found = _fastest_exact(found)
    sizes: dict[str, set[int]] = {}
    for one in found:
        sizes.setdefault(one.row.scene, set()).add(one.row.tokens)
    comparisons = []
    for scene, tokens in ((name, sorted(several)) for name, several in sizes.items() if len(several) > 2):
        kept = set(tokens[::2])
        here = [m for m in found if m.row.scene == scene]
        names = dict.fromkeys(m.row.operator for m in here if m.work.operator != "exact")
        exact = {m.row.tokens: m for m in here if m.work.operator == "exact"}
        for name in names:
            ours = {m.row.tokens: m for m in here if m.row.operator == name}
            if set(ours) != set(tokens):
                continue
            fitted = stored.calibrate(
                [side[n].timing for side in (exact, ours) for n in tokens if n in kept], source="every other size"
            )
            left_out = [
                fitted.seconds(one.work, one.timing.dtype) / one.timing.seconds
                for n, one in ours.items()
                if n not in kept
            ]
            comparisons.append(
                BreakEven(
                    scene,
                    name,
                    tokens[-1],
                    crossing(tokens, [1 / ours[n].row.speed_up for n in tokens]),
                    crossing(tokens, [_ratio(fitted, ours[n]) for n in tokens]),
                    crossing(tokens, [_ratio(stored, ours[n]) for n in tokens]),
                    max(max(ratio, 1 / ratio) for ratio in left_out),
                )
            )
    return stored.calibrate([m.timing for m in found], source="this run"), comparisons


def _fastest_exact(found: Sequence[Measured]) -> list[Measured]:
    """Leave out the forms of exact attention that are not the fastest of their sizes: their ratio is below one."""
    return [one for one in found if one.work.operator != "exact" or one.row.speed_up >= 1.0]


def _ratio(model: DeviceModel, one: Measured) -> float:
    """Predicted time of an operator over that of exact attention."""
    dtype = one.timing.dtype
    return model.seconds(one.work, dtype) / model.seconds(exact_work(one.shape), dtype)


def crossing(tokens: Sequence[int], ratios: Sequence[float]) -> float:
    """Where a ratio of times falls below one for good, by straight lines between logarithms.

    Returns:
        The number of tokens; the fewest where it is below one throughout, NaN where it is not below one at the most.
    """
    if ratios[-1] >= 1.0:
        return math.nan
    last = max((i for i, ratio in enumerate(ratios) if ratio >= 1.0), default=-1)
    if last < 0:
        return float(tokens[0])
    (x0, x1), (y0, y1) = ([math.log(value) for value in values[last : last + 2]] for values in (tokens, ratios))
    return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))


def as_json(value: object) -> object:
    """Make a value JSON's: no NaN, no infinity, no dataclass."""
    if hasattr(value, "__dataclass_fields__"):
        return as_json(asdict(value))  # type: ignore[call-overload]
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
