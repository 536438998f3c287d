"""Turns rows of training into named metrics of a tracker, and decides when they are sent."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ttr_distill.metrics import MetricValue

QUANTILES = MappingProxyType({"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "max": 1.0})
SPREAD = (
    "loss",
    "mse",
    "nmse",
    "cosine_similarity",
    "ema_cosine_dist",
    "ema_loss",
    "alpha_sigmoid",
    "sigma",
    "cfg_scale",
    "layers_swapped",
    "layers_total",
)
"""Metrics whose spread over the layers is sent."""
_EMA_DECAY = 0.9
_NAMES = frozenset({"layer", "run", "kind", "level", "cosine", "ema_cosine"})


class Record(NamedTuple):
    """What is sent at once.

    Attributes:
        metrics: By full name; finite.
        step: Its position on the x axis.
    """

    metrics: dict[str, float]
    step: int


class MetricNames(Protocol):
    """Names metrics and keeps the cadence."""

    def take(self, row: Mapping[str, MetricValue]) -> Record | None:
        """Take a row; return what is due, if anything."""
        ...

    def final(self) -> Record | None:
        """Return what was not sent yet; there are no more rows."""
        ...


def should_log_step(step: int, every: int, total: int | None = None, *, first: bool = False) -> bool:
    """Return whether a step is due: every so many, the last, and the first if asked for."""
    if step <= 0:
        return False
    return (first and step == 1) or step == total or step % max(1, every) == 0


def pareto_frontier(distances: Iterable[float]) -> tuple[float, float | None]:
    """Rate the ready students together: how many there are, times how good the worst is.

    Args:
        distances: Cosine distance of each ready student; one that is not finite counts as 1.

    Returns:
        ``count * max(0, 1 - worst)``, and the worst distance within [0, 1], ``None`` without any student.
    """
    clamped = [min(1.0, max(0.0, value)) if math.isfinite(value) else 1.0 for value in distances]
    if not clamped:
        return 0.0, None
    return len(clamped) * (1.0 - max(clamped)), max(clamped)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return ``QUANTILES`` of the finite values, interpolated linearly; empty if there are none."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return {}
    result = {}
    for name, share in QUANTILES.items():
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        result[name] = ordered[low] + (position - low) * (ordered[high] - ordered[low])
    return result


class DistillMetricNames:
    """``flux2ttr/...``: every layer's latest numbers, their spread over the layers, and the running means of one layer.

    Rows come at the end of a sampling run, one per layer, and their layers' updates add up to the step.

    Args:
        every: Send after so many updates.
        total: Number of updates after which training ends; ``None`` if it is open.
    """

    def __init__(self, every: int = 50, total: int | None = None) -> None:
        self.every = max(1, every)
        self.total = total
        self._latest: dict[str, dict[str, float]] = {}
        self._means: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
        self._sent = 0
        self._last: str | None = None

    @property
    def updates(self) -> int:
        """Updates of all layers in the rows so far."""
        return int(sum(metrics.get("updates", 0.0) for metrics in self._latest.values()))

    def take(self, row: Mapping[str, MetricValue]) -> Record | None:
        """Take the row of a layer; see ``MetricNames``."""
        if row.get("layer") is None:
            return None
        layer = str(row["layer"])
        metrics = _layer_metrics(row)
        if "loss" in metrics:
            before = self._latest.get(layer, {}).get("ema_loss", metrics["loss"])
            metrics["ema_loss"] = _EMA_DECAY * before + (1.0 - _EMA_DECAY) * metrics["loss"]
        self._latest[layer] = metrics
        for name, value in metrics.items():
            mean, count = self._means[layer].get(name, (0.0, 0))
            self._means[layer][name] = (mean + (value - mean) / (count + 1), count + 1)
        self._last = layer
        due = self.updates // self.every > self._sent // self.every or self.updates == self.total
        return self._record(layer) if due and self.updates > self._sent else None

    def final(self) -> Record | None:
        """See ``MetricNames``."""
        return None if self._last is None or self.updates == self._sent else self._record(self._last)

    def _record(self, current: str) -> Record:
        self._sent = self.updates
        metrics = {
            f"flux2ttr/{layer}/{name}": value
            for layer, latest in self._latest.items()
            for name, value in latest.items()
        }
        metrics |= {f"flux2ttr/{current}/avg_{name}": mean for name, (mean, _) in self._means[current].items()}
        return Record(
            metrics | {f"flux2ttr/global/{name}": value for name, value in self._overall().items()}, self._sent
        )

    def _overall(self) -> dict[str, float]:
        layers = list(self._latest.values())
        ready = [metrics for metrics in layers if metrics.get("ready") == 1.0]
        overall = {
            "updates_done": float(self._sent),
            "layers_tracked": float(len(layers)),
            "layers_ready": float(len(ready)),
            "layers_ready_ratio": len(ready) / len(layers),
        }
        if self.total is not None:
            overall["steps_remaining"] = float(max(0, self.total - self._sent))
        for name in ("log_var_huber", "log_var_cosine"):
            values = [metrics[name] for metrics in layers if name in metrics]
            if values:
                overall[name] = sum(values) / len(values)
        for name in SPREAD:
            quantiles = spread(metrics[name] for metrics in layers if name in metrics)
            overall |= {f"{name}_{quantile}": value for quantile, value in quantiles.items()}
        frontier, worst = pareto_frontier(
            metrics.get("ema_cosine_dist", 1.0 - metrics.get("cosine_similarity", 0.0)) for metrics in ready
        )
        overall["pareto_frontier"] = frontier
        if worst is not None:
            overall["pareto_worst_ema_cosine_dist"] = worst
        return overall


class ControllerMetricNames:
    """``flux2ttr_controller/...``: the numbers of a row as they are, at the first step, every so many, and the last.

    Args:
        every: Send every so many steps.
        total: Number of the last step; ``None`` if it is open.
    """

    def __init__(self, every: int = 10, total: int | None = None) -> None:
        self.every = max(1, every)
        self.total = total
        self._row: dict[str, float] | None = None
        self._step = 0
        self._sent = True

    def take(self, row: Mapping[str, MetricValue]) -> Record | None:
        """Take the row of a step, which has its number under ``step``; see ``MetricNames``."""
        numbers = finite_numbers(row)
        self._step = int(numbers.get("step", self._step + 1))
        for name in ("full_attn_ratio", "actual_full_attn_ratio"):
            if name in numbers:
                numbers.setdefault("full_attn_eligible", numbers[name])
        self._row, self._sent = numbers, False
        return self._record() if should_log_step(self._step, self.every, self.total, first=True) else None

    def final(self) -> Record | None:
        """Return the last row if it was not sent, and that training is complete if it is; see ``MetricNames``."""
        if self._row is None:
            return None
        pending = {} if self._sent else self._record().metrics
        if self._step == self.total:
            done = {"training_completed": 1.0, "total_steps": float(self._step)}
            if "iteration" in self._row:
                done["total_iterations"] = self._row["iteration"]
            if "reward_baseline" in self._row:
                done["final_reward_baseline"] = self._row["reward_baseline"]
            pending |= {f"flux2ttr_controller/{name}": value for name, value in done.items()}
        return Record(pending, self._step) if pending else None

    def _record(self) -> Record:
        self._sent = True
        return Record({f"flux2ttr_controller/{name}": value for name, value in (self._row or {}).items()}, self._step)


def finite_numbers(row: Mapping[str, MetricValue]) -> dict[str, float]:
    """Return the finite numbers of a row; truth values are 0 and 1."""
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _layer_metrics(row: Mapping[str, MetricValue]) -> dict[str, float]:
    """Numbers of a layer under the names that trackers show."""
    numbers = finite_numbers(row)
    named = {name: value for name, value in numbers.items() if name not in _NAMES}
    if "level" in row:
        named["ready"] = float(row["level"] == "ready")
    distance = numbers.get("cosine", numbers.get("heldout_cosine"))
    if distance is not None:
        named.setdefault("cosine_similarity", 1.0 - distance)
    if "ema_cosine" in numbers:
        named.setdefault("ema_cosine_dist", numbers["ema_cosine"])
    if "heldout_relative_l2" in numbers:
        # The squared distance over the squared length of the teacher's answer.
        named.setdefault("nmse", numbers["heldout_relative_l2"] ** 2)
    return named
