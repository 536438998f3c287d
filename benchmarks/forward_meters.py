"""Time, memory and profile of a forward, and what they say together."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from attn_dispatch import AttentionCall
from forward_methods import Method, empty_call
from forward_scenes import Scene, attention_share, ceiling
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from ttr_distill.adapters.diffusers import DiffusersHost

# The meters of the operators' benchmark serve here as well.
sys.path.append(str(Path(__file__).parents[1] / "packages" / "attn-kernels" / "benchmarks"))

from meters import Run, best_seconds, extra_memory

ATTENTION_EVENTS = ("scaled_dot_product", "attention", "attn", "flash", "fmha", "sdpa")
"""Parts of the names under which a profiler lists exact attention, operators on a CPU and kernels on a GPU."""


@dataclass(frozen=True)
class Row:
    """One method in one scene.

    Attributes:
        scene: Name of the scene.
        method: Name of the method.
        answered: Share of the attention calls that the approximation answered.
        declined: Why it did not answer the others; ``None`` if there are none.
        foretold: How many times as fast as exact attention the cost model had the attention alone.
        milliseconds: The whole forward; ``None`` if it was declined and therefore not timed: exact attention ran.
        speed_up: Times as fast as the forward with exact attention of the same run; ``None`` likewise.
        peak_memory: How far memory rises during the forward above the weights and arguments, in MiB.
    """

    scene: str
    method: str
    answered: float
    declined: str | None
    foretold: float
    milliseconds: float | None
    speed_up: float | None
    peak_memory: float | None


@dataclass(frozen=True)
class Share:
    """How much of a forward exact attention is.

    Attributes:
        scene: Name of the scene.
        cut: The model, in words.
        tokens: Text and image tokens.
        profiled: Share of the forward's time, by the profiler.
        ceiling: How many times faster the forward would be if attention took no time.
        arithmetic: Share of the operations of this cut.
        whole: Share of the operations of the whole Flux.1-dev.
        whole_ceiling: Ceiling of the whole model, by operations.
        declining: Time that declining every call of a forward takes, as a share of the forward with exact attention.
    """

    scene: str
    cut: str
    tokens: int
    profiled: float
    ceiling: float
    arithmetic: float
    whole: float
    whole_ceiling: float
    declining: float


def forward(model: nn.Module, handler: Method, arguments: dict[str, Tensor]) -> Run:
    """Return a forward whose attention the handler answers."""

    def run() -> Tensor:
        with DiffusersHost(model, handler):
            handler.begin_run()
            try:
                out: Tensor = model(**arguments, return_dict=False)[0]
            finally:
                handler.end_run()
        return out

    return run


class Pass(NamedTuple):
    """What one profiled forward tells.

    Attributes:
        seconds: How long it took.
        memory: How far memory rose, in MiB: what torch's allocator handed out, not what the process holds.
        share: Share of exact attention in its time.
    """

    seconds: float
    memory: float
    share: float


def first_pass(run: Run, device: torch.device) -> Pass:
    """Run a forward once and take everything from it; the time lies inside the profiler's."""
    cuda = device.type == "cuda"
    if cuda:
        extra_memory(run, device)  # Compiles what is to be compiled.
    memory = extra_memory(run, device) if cuda else math.nan
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds, profile_memory=not cuda) as profiler:
        seconds = best_seconds([run], 1, device)[0]
    return Pass(seconds, memory if cuda else _allocated(profiler), _attention_share(profiler, device))


def _allocated(profiler: profile) -> float:
    """Most memory in MiB that a CPU's allocator had handed out since the profile began."""
    peak, waiting = 0, list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        peak = max(peak, getattr(event.extra_fields, "total_allocated", 0))
    return float(peak) / 2**20


def _attention_share(profiler: profile, device: torch.device) -> float:
    """Share of exact attention in what was profiled: that of kernels on a GPU, of operators on a CPU."""
    total = attention = 0.0
    for event in profiler.key_averages():
        if device.type == "cuda":
            # Operators carry the time of the kernels that they started: counted once, as kernels.
            own = event.self_device_time_total if event.device_type == DeviceType.CUDA else 0.0
        else:
            own = event.self_cpu_time_total
        total += own
        if any(part in event.key.lower() for part in ATTENTION_EVENTS):
            attention += own
    return attention / total if total else math.nan


def declining_seconds(methods: Sequence[Method], scene: Scene, device: torch.device, dtype: torch.dtype) -> float:
    """Most time that an approximation takes to decline a call, in seconds: the mean of many calls of nothing else."""
    call = empty_call(scene, device, dtype)

    def native(asked: AttentionCall) -> Tensor:
        return asked.q

    longest, calls = 0.0, 200
    for method in (one for one in methods if one.foretold(scene, device, dtype)[1] is not None):
        start = time.process_time()
        for _ in range(calls):
            method.router(call, native)
        longest = max(longest, (time.process_time() - start) / calls)
        method.router.report.clear()
    return longest


def timed(scene: Scene, methods: Sequence[Method], device: torch.device, dtype: torch.dtype) -> list[Method]:
    """The methods whose time is worth measuring.

    With several rounds that is every one, for the cost of declining; with one it is those that do not decline.
    """
    wanted = [one for one in methods if not scene.only or one.name in scene.only]
    return [one for one in wanted if scene.rounds > 1 or one.foretold(scene, device, dtype)[1] is None]


def measure(
    scene: Scene, model: nn.Module, methods: Sequence[Method], arguments: dict[str, Tensor]
) -> tuple[list[Row], Share]:
    """Time every method on one scene; the first of ``methods`` is exact attention and is profiled, too."""
    device, dtype = arguments["hidden_states"].device, arguments["hidden_states"].dtype
    wanted = [one for one in methods if not scene.only or one.name in scene.only]
    for one in wanted:
        one.router.report.clear()
    chosen = timed(scene, wanted, device, dtype)
    runs = [forward(model, one, arguments) for one in chosen]
    declining = declining_seconds(wanted, scene, device, dtype)
    passes = [first_pass(run, device) for run in runs]
    seconds = [one.seconds for one in passes]
    if device.type == "cuda":
        seconds = best_seconds(runs, scene.rounds, device)
    elif scene.rounds > 1:
        seconds = [min(both) for both in zip(seconds, best_seconds(runs, scene.rounds - 1, device), strict=True)]
    else:
        # There is time for one forward with exact attention, whose few operators the profiler does not slow down.
        seconds[1:] = best_seconds(runs[1:], 1, device)
    figures = {one.name: (own, first.memory) for one, own, first in zip(chosen, seconds, passes, strict=True)}
    rows = [_row(scene, one, figures, device, dtype) for one in wanted]
    return rows, _share(scene, passes[0].share, declining * scene.cut.layers / figures["exact"][0])


def _row(
    scene: Scene, method: Method, figures: dict[str, tuple[float, float]], device: torch.device, dtype: torch.dtype
) -> Row:
    exact = figures["exact"][0]
    foretold, refusal = method.foretold(scene, device, dtype)
    own, peak = figures.get(method.name, (None, None))
    report = method.router.report
    answered = sum(count for name, count in report.counts().items() if name != "native")
    share = answered / max(1, sum(report.counts().values()))
    declines = tuple(report.declines())
    if own is None:
        return Row(scene.name, method.name, 0.0, refusal, foretold, None, None, None)
    reason = declines[0] if declines else None
    return Row(scene.name, method.name, share, reason, foretold, 1e3 * own, exact / own, peak)


def _share(scene: Scene, profiled: float, declining: float) -> Share:
    arithmetic, whole = attention_share(scene.tokens, scene.cut), attention_share(scene.tokens)
    words = (scene.name, str(scene.cut), scene.tokens)
    return Share(*words, profiled, ceiling(profiled), arithmetic, whole, ceiling(whole), declining)
