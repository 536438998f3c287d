"""The whole job on the embedded teacher: distil, measure, learn to route, compare, time; each phase resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from ttr_distill.distributed import World
from ttr_distill.metrics import QueuedSink

from ttr_controller.pipeline import comparing, distilling, layer_fidelity, routing, timing, verdicts
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import Plan
from ttr_controller.pipeline.workbench import Tick, Workbench


class PhaseProgress(Protocol):
    """What shows progress; phases do not know who."""

    def start(self, title: str, work: float) -> int:
        """Begin a phase of ``work`` units and return its number."""
        ...

    def advance(self, phase: int, work: float) -> None:
        """Some work of a phase is done."""
        ...

    def finish(self, phase: int) -> None:
        """A phase is done."""
        ...


class Silent:
    """Shows nothing."""

    def start(self, title: str, work: float) -> int:
        """Begin a phase."""
        return 0

    def advance(self, phase: int, work: float) -> None:
        """Go on."""

    def finish(self, phase: int) -> None:
        """End a phase."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        title: What a user reads while it runs.
        run: Does the work and records the section of the phase's name.
        work: Units of work for the progress bar under a plan.
    """

    title: str
    run: Callable[[Workbench, Tick], None]
    work: Callable[[Plan], float]


def _distill(bench: Workbench, tick: Tick) -> None:
    distilling.distill(bench, tick)


def _fidelity(bench: Workbench, tick: Tick) -> None:
    layer_fidelity.measure_fidelity(bench, distilling.load_trained(bench), tick)


def _controller(bench: Workbench, tick: Tick, learning: routing.Learning | None = None) -> None:
    routing.learn_routing(bench, distilling.load_trained(bench), tick, learning)


def _compare(bench: Workbench, tick: Tick) -> None:
    students = distilling.load_trained(bench)
    comparing.compare(bench, students, routing.load_routing(bench), tick)


def _timing(bench: Workbench, tick: Tick) -> None:
    timing.measure_times(bench, distilling.load_trained(bench), tick)


PHASES: Mapping[str, Phase] = MappingProxyType(
    {
        "distillation": Phase("distil a student per layer", _distill, lambda plan: 2.0 * plan.distill_images),
        "fidelity": Phase("compare attention layer by layer", _fidelity, lambda plan: 3.0 * plan.fidelity_prompts),
        "controller": Phase("learn where students may run", _controller, routing.work),
        "pareto": Phase("sample held-out prompts", _compare, comparing.work),
        "timing": Phase("time 256 to 4,096 tokens", _timing, timing.work),
    }
)
FOLLOWING = ("pareto", "sheet", "checks", "complete")
"""Sections that a new controller makes out of date."""


def run_controller(
    run: RunDirectory,
    method: str,
    rollouts: int | None = None,
    progress: PhaseProgress | None = None,
    *,
    world: World | None = None,
    trackers: Sequence[QueuedSink] = (),
) -> None:
    """Learn to route by a method; a run whose controller was learnt by another method learns anew.

    Args:
        run: A run whose students are distilled.
        method: ``"auto"`` or one of ``ttr_controller.methods.METHODS``.
        rollouts: Images that refining may sample; ``None``: the method's default.
        progress: Shows progress.
        world: The processes that learn together; only the main one writes. ``None``: this one alone.
        trackers: Get the metric rows beside the file.

    Raises:
        RunError: The method is unknown, or students are missing.
        CheckpointError: A checkpoint of the run is damaged.
    """
    learning = routing.Learning(method, rollouts)
    run.section("distillation")
    if run.has("controller") and run.section("controller").get("learner", routing.AUTO) != method:
        run.forget("controller", *FOLLOWING)
    run.writes = world is None or world.main
    run_phases(run, ("controller",), progress, learning, world=world, trackers=trackers)


def run_phases(
    run: RunDirectory,
    names: Sequence[str],
    progress: PhaseProgress | None = None,
    learning: routing.Learning | None = None,
    *,
    world: World | None = None,
    trackers: Sequence[QueuedSink] = (),
) -> None:
    """Run the named phases that the run has not done yet, in order; then judge the run if all are done.

    Args:
        run: The run.
        names: Names of ``PHASES``.
        progress: Shows progress.
        learning: How the phase ``controller`` learns; ``None``: ``"auto"``.
        world: The processes that work together; only the phase ``controller`` shares its work.
        trackers: Get the metric rows of the training among the phases.

    Raises:
        RunError: The folder cannot be written, or an earlier phase is missing.
        CheckpointError: A checkpoint of the run is damaged.
    """
    show = progress or Silent()
    missing = [name for name in names if not run.has(name)]
    if missing:
        start = time.perf_counter()
        bench = Workbench.open(run)
        bench.world, bench.trackers = world or World(), tuple(trackers)
        plan = bench.plan()
        run.add_seconds("preparation", time.perf_counter() - start)
        for name in missing:
            phase = PHASES[name]
            amount = routing.work(plan, learning) if name == "controller" else phase.work(plan)
            number = show.start(phase.title, amount)
            run_it = partial(_controller, learning=learning) if name == "controller" else phase.run
            run_it(bench, partial(show.advance, number))
            show.finish(number)
    if all(run.has(name) for name in PHASES) and not run.complete:
        run.record("checks", verdicts.judge(run))
        run.record("complete", True)
