"""Attention and whole-step time of exact attention and students at several sizes, and where students start to pay."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from attn_dispatch import AttentionHandler, AttentionRouter, DispatchReport
from ttr_distill.student import StudentBank, preset
from ttr_distill.tiny import TinySampler, heldout_prompts

from ttr_controller.pipeline.settings import Plan
from ttr_controller.pipeline.workbench import Students, Tick, Workbench


@dataclass(frozen=True)
class Timing:
    """Times of one variant at one size.

    Attributes:
        tokens: Image tokens.
        variant: ``"exact"`` or the preset.
        attention_ms: Milliseconds of all attention of one forward, per repeat.
        step_ms: Milliseconds of one whole forward, per repeat.
    """

    tokens: int
    variant: str
    attention_ms: Sequence[float]
    step_ms: Sequence[float]

    def row(self) -> dict[str, object]:
        """The row of the report: medians, and the spread of the attention time."""
        return {
            "tokens": self.tokens,
            "variant": self.variant,
            "attention_ms": statistics.median(self.attention_ms),
            "step_ms": statistics.median(self.step_ms),
            "attention_ms_spread": [min(self.attention_ms), max(self.attention_ms)],
        }


def work(plan: Plan) -> float:
    """Units of progress: one for each of two variants, three sizes and every repeat."""
    return 6.0 * (plan.timing_repeats + 1)


def break_even(tokens: Sequence[int], exact: Sequence[float], student: Sequence[float]) -> float | None:
    """Smallest size from which the student is faster than exact attention at every larger measured size.

    Between two measured sizes the logarithm of the ratio is taken as linear in the logarithm of the tokens.

    Args:
        tokens: Measured sizes, ascending.
        exact: Time of exact attention at each size.
        student: Time of the student at each size.

    Returns:
        The size: the smallest measured one if the student is faster everywhere, ``None`` if it is slower at the
        largest.
    """
    ratios = [math.log(s / e) for s, e in zip(student, exact, strict=True)]
    if ratios[-1] >= 0:
        return None
    for i in range(len(ratios) - 1, 0, -1):
        if ratios[i - 1] >= 0:
            part = ratios[i - 1] / (ratios[i - 1] - ratios[i])
            low, high = math.log(tokens[i - 1]), math.log(tokens[i])
            return math.exp(low + part * (high - low))
    return float(tokens[0])


def measure_times(bench: Workbench, students: Students, tick: Tick) -> None:
    """Time exact attention and students in turn at every size and record the section ``timing``."""
    start = time.perf_counter()
    repeats = bench.plan().timing_repeats
    variants: dict[str, StudentBank | None] = {"exact": None, bench.run.settings.preset: students.bank}
    if "near_far" not in variants:
        variants["near_far"] = bench.new_bank(preset("near_far"))
    timings = []
    for side in bench.run.settings.timing_sides:
        sampler = TinySampler(bench.teacher, rows=side, columns=side, steps=2, guidance=1.0)
        timings += _time_size(bench, sampler, variants, repeats, tick)
    by_variant = {name: [t for t in timings if t.variant == name] for name in variants}
    exact = by_variant.pop("exact")
    sizes = [t.tokens for t in exact]
    points = {
        name: {
            "attention_tokens": break_even(sizes, _medians(exact, "attention_ms"), _medians(rows, "attention_ms")),
            "step_tokens": break_even(sizes, _medians(exact, "step_ms"), _medians(rows, "step_ms")),
        }
        for name, rows in by_variant.items()
    }
    section = {"threads": torch.get_num_threads(), "rows": [t.row() for t in timings], "break_even": points}
    bench.run.record("timing", section, time.perf_counter() - start)


def _medians(timings: Sequence[Timing], field: str) -> list[float]:
    return [statistics.median(getattr(timing, field)) for timing in timings]


def _time_size(
    bench: Workbench, sampler: TinySampler, variants: dict[str, StudentBank | None], repeats: int, tick: Tick
) -> list[Timing]:
    """Time one forward of every variant at one size; the variants take turns, so that drift meets all alike."""
    prompt = heldout_prompts()[:1]
    latent = sampler.noise(prompt, [0])
    attention: dict[str, list[float]] = {name: [] for name in variants}
    step: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, bank in variants.items():
            report = DispatchReport()
            measured = AttentionRouter((), report) if bank is None else bench.route(bank, (), report)
            plain: AttentionHandler | None = None if bank is None else bench.route(bank, ())
            whole = _seconds(bench, sampler, latent, prompt, plain)
            measured.begin_run()
            _seconds(bench, sampler, latent, prompt, measured)
            measured.end_run()
            if repeat:  # the first round warms caches up
                step[name].append(1e3 * whole)
                attention[name].append(1e3 * report.attention_seconds())
            tick(1.0)
    tokens = sampler.rows * sampler.columns
    return [Timing(tokens, name, attention[name], step[name]) for name in variants]


def _seconds(
    bench: Workbench,
    sampler: TinySampler,
    latent: torch.Tensor,
    prompt: Sequence[str],
    handler: AttentionHandler | None,
) -> float:
    cuda = bench.run.settings.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    sampler.velocity(latent, 0, prompt, handler)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
