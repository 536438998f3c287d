"""How long work takes on a device: a fixed part, and what is done over the rate at which it is done."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch

from attn_kernels.targets import Target, device_target


class Work(NamedTuple):
    """What an operator does in one call.

    Attributes:
        operator: Its name, the key of efficiencies and overheads; ``"taylor:3"`` is a variant of ``"taylor"``.
        flops: Floating-point operations in matrix products, a multiply-add counted as two.
        exponentials: Exponentials, activations of a network among them.
        products: Numbers multiplied one by one: the monomials of a series.
        values: Numbers read from or written to memory, each tensor once.
        launches: Kernels or passes one after the other.
        copied: Numbers that a torch form copies between its passes and a kernel never writes: gathered keys and values.
    """

    operator: str
    flops: float
    exponentials: float
    products: float
    values: float
    launches: int
    copied: float = 0.0


class Timing(NamedTuple):
    """A measured call.

    Attributes:
        work: What was done.
        dtype: Dtype of the tensors.
        seconds: How long it took.
    """

    work: Work
    dtype: torch.dtype
    seconds: float


@dataclass(frozen=True)
class DeviceModel:
    """Rates of a device and how much of them each operator reaches.

    Attributes:
        name: The device, in words.
        source: Where the numbers come from; says so if they are not measured.
        flops: Operations per second of matrix products, by the name of the dtype (``"float32"``).
        exponentials: Exponentials per second.
        products: Single products per second.
        bandwidth: Bytes per second to and from memory.
        launch_seconds: Time of a launch that does nothing.
        overlaps: Whether matrix products, the rest and memory proceed at the same time: the slowest alone counts.
        efficiency: Share of the rates that an operator reaches; above one where the rates are cautious. A variant that
            is not named has that of its operator, an operator that is not named that of ``"other"``.
        overhead: Seconds of a call beyond its launches, named in the same way; zero where there is no name.
        copying: Bytes per second copied between the passes of a torch form; infinite where kernels do without.
    """

    name: str
    source: str
    flops: Mapping[str, float]
    exponentials: float
    products: float
    bandwidth: float
    launch_seconds: float
    overlaps: bool
    efficiency: Mapping[str, float]
    overhead: Mapping[str, float] = field(default_factory=dict)
    copying: float = math.inf

    def __post_init__(self) -> None:
        rates = (*self.flops.values(), *self.efficiency.values(), self.exponentials, self.products, self.bandwidth)
        if not self.flops or "other" not in self.efficiency or not all(0.0 < rate < math.inf for rate in rates):
            raise ValueError(f"{self.name}: rates and efficiencies must be positive, 'other' among them, got {self}")
        if not self.copying > 0.0:
            raise ValueError(f"{self.name}: copying must be positive, got {self.copying}")
        if self.launch_seconds < 0.0 or any(seconds < 0.0 for seconds in self.overhead.values()):
            raise ValueError(f"{self.name}: launch_seconds and overhead must not be negative, got {self}")

    @property
    def measured(self) -> bool:
        """Whether the numbers were measured on such a device."""
        return self.source.startswith("measured")

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """Predict the time of one call, in seconds.

        Raises:
            ValueError: The model has no rate for the dtype.
        """
        family = work.operator.partition(":")[0]
        share = self.efficiency.get(work.operator, self.efficiency.get(family, self.efficiency["other"]))
        fixed = self.overhead.get(work.operator, self.overhead.get(family, 0.0))
        return fixed + work.launches * self.launch_seconds + self.ideal_seconds(work, dtype) / share

    def ideal_seconds(self, work: Work, dtype: torch.dtype) -> float:
        """Time of the work at the device's full rates, without any fixed part, in seconds.

        Raises:
            ValueError: The model has no rate for the dtype.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            raise ValueError(f"the model of {self.name} has rates for {', '.join(self.flops)}, not for {name}")
        parts = (
            work.flops / self.flops[name],
            work.exponentials / self.exponentials,
            work.products / self.products,
            work.values * dtype.itemsize / self.bandwidth,
            work.copied * dtype.itemsize / self.copying,
        )
        return max(parts) if self.overlaps else sum(parts)

    def calibrate(self, timings: Sequence[Timing], *, source: str) -> Self:
        """Fit efficiency and overhead of each measured operator; operators without a timing stay as they are.

        Least squares of the relative error of ``overhead + launches + ideal / efficiency`` under an overhead that is
        not negative. One timing of an operator fixes its efficiency and leaves its overhead at zero.

        Args:
            timings: Measured calls, at several sizes.
            source: What was measured; the model's new ``source``, with "measured" in front.

        Raises:
            ValueError: A timing is not positive.
        """
        efficiency, overhead = dict(self.efficiency), dict(self.overhead)
        for operator in dict.fromkeys(timing.work.operator for timing in timings):
            rows = [
                (
                    self.ideal_seconds(timing.work, timing.dtype),
                    timing.seconds - timing.work.launches * self.launch_seconds,
                    timing.seconds,
                )
                for timing in timings
                if timing.work.operator == operator
            ]
            if any(seconds <= 0.0 for *_, seconds in rows):
                raise ValueError(f"timings of {operator!r} must be positive")
            slope, fixed = fit_line(rows)
            efficiency[operator], overhead[operator] = 1.0 / slope, fixed
        return replace(self, efficiency=efficiency, overhead=overhead, source=f"measured: {source}")


def fit_line(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Fit ``y = slope x + fixed`` with the error of each row relative to its third number.

    Returns:
        A slope above zero and a fixed part of at least zero.
    """
    one = x1 = y1 = xx = xy = 0.0
    for x, y, scale in rows:
        weight = scale**-2
        one, x1, y1 = one + weight, x1 + weight * x, y1 + weight * y
        xx, xy = xx + weight * x * x, xy + weight * x * y
    determinant = one * xx - x1 * x1
    # Rows of one size determine no line.
    if determinant > 1e-9 * one * xx:
        slope, fixed = (one * xy - x1 * y1) / determinant, (xx * y1 - x1 * xy) / determinant
        if slope > 0.0 and fixed >= 0.0:
            return slope, fixed
    through_zero = xy / xx
    return (through_zero, 0.0) if through_zero > 0.0 else (max(y for _, y, _ in rows) / max(x for x, *_ in rows), 0.0)


def device_model(device: torch.device | str) -> DeviceModel:
    """Return the stored model of a device.

    The CPU's rates are those of one core, times the threads that torch uses. GPUs are modelled: their rates come from
    what such devices reach in matrix products and copies, their efficiencies from compiled code, and none of it was
    timed. ``DeviceModel.calibrate`` replaces both by measurements.

    Args:
        device: ``"cpu"``, ``"cuda"``, or another one, for which the CPU's numbers stand in.
    """
    device = torch.device(device)
    return gpu_model(device_target(device)) if device.type == "cuda" else cpu_model(torch.get_num_threads())


def cpu_model(threads: int = 1) -> DeviceModel:
    """Return the model of a CPU with AVX-512, measured on one core and taken to grow with the threads."""
    return DeviceModel(
        name=f"CPU, {threads} threads",
        source="measured: one thread of an AMD EPYC (Zen 4), torch 2.15, float32; see benchmarks/results",
        flops={name: threads * rate for name, rate in (("float32", 96e9), ("float16", 96e9), ("bfloat16", 96e9))},
        exponentials=threads * 2e9,
        products=threads * 2e9,
        bandwidth=threads * 12e9,
        launch_seconds=2e-6,
        overlaps=False,
        efficiency={
            "exact": 0.97,
            "hybrid": 0.24,
            "kernel_regression": 0.86,
            "kernel_regression:bf16": 1.4,
            "kernel_regression:given": 0.71,
            "kernel_regression:hedgehog": 1.2,
            "landmark": 0.91,
            "near_far": 0.62,
            "near_far:4": 0.68,
            "near_far:8": 0.62,
            "other": 0.5,
            # Of the work that kernels do; what the torch form does by its settings is "taylor_blocked".
            "taylor": 0.6,
            "taylor_blocked": 0.73,
            "window": 0.24,
        },
        overhead={
            "exact": 8.2e-05,
            "hybrid": 0.0015,
            "kernel_regression": 0.0022,
            "kernel_regression:bf16": 0.0023,
            "kernel_regression:hedgehog": 0.0013,
            "landmark": 0.00069,
            "near_far": 0.0012,
            "near_far:4": 0.0008,
            "near_far:8": 0.0012,
            "taylor": 0.0012,
            "taylor_blocked": 0.001,
        },
        copying=threads * 8e9,
    )


_GPU_RATES: tuple[tuple[Target, str, float, float, float, float, float], ...] = (
    # Name, then operations in half precision and in float32, exponentials, products, bytes, all per second.
    ("sm80", "A100", 260e12, 17e12, 2.4e12, 30e12, 1.5e12),
    ("sm86", "RTX 30", 65e12, 25e12, 2.2e12, 17e12, 0.8e12),
    ("sm89", "RTX 40", 150e12, 70e12, 5.1e12, 40e12, 0.9e12),
    ("sm90", "H100", 798e12, 50e12, 3.7e12, 59e12, 3.0e12),
    ("sm100", "B200", 1700e12, 65e12, 4.4e12, 70e12, 6.5e12),
    ("sm120", "RTX 50", 200e12, 85e12, 6.5e12, 52e12, 1.5e12),
    ("gfx942", "MI300", 600e12, 80e12, 10e12, 80e12, 4.0e12),
)


def gpu_model(target: Target) -> DeviceModel:
    """Return the model of a family of GPUs; nothing in it but the H100's products and copies was measured."""
    _, name, half, single, exponentials, products, bandwidth = next(row for row in _GPU_RATES if row[0] == target)
    return DeviceModel(
        name=f"{name} ({target})",
        source="not measured: modelled from the rates of the device and the compiled kernels",
        flops={"bfloat16": half, "float16": half, "float32": single},
        exponentials=exponentials,
        products=products,
        bandwidth=bandwidth,
        launch_seconds=5e-6,
        overlaps=True,
        efficiency={
            "exact": 0.81,
            "near_far": 0.49,
            "taylor": 0.29,
            "taylor:2": 0.65,
            "taylor:3": 0.65,
            # Computed in float32, whatever the dtype of the tensors.
            "taylor_blocked": 0.4 * single / half,
            "landmark": 0.75,
            "window": 0.63,
            "hybrid": 0.5,
            "kernel_regression": 0.54,
            "other": 0.4,
        },
    )
