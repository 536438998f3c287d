"""Commands that run phases: quickstart, train-controller and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ttr_controller.cli.tracking import Comet, Trackio, open_trackers

if TYPE_CHECKING:
    from ttr_controller.pipeline.run_directory import RunDirectory

Out = Annotated[Path, typer.Option("--out", help="Folder of the run; made if missing, resumed if it holds this run.")]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        help="Student: **near_far** keeps near tokens exact and pools far ones, no training needed; "
        "**hkr** is a learned kernel regression with landmarks.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Budget = Annotated[float, typer.Option("--budget", help="Wall time to aim at, in minutes; less budget, fewer images.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random draw.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]

DEFAULT_OUT = Path("ttr-quickstart")


def quickstart(
    out: Out = DEFAULT_OUT,
    preset: PresetName = "near_far",
    device: Device = "auto",
    budget: Budget = 3.5,
    seed: Seed = 0,
) -> None:
    """Distil, learn to route, sample, measure and report, on the embedded teacher.

    Takes about `--budget` minutes and ends with one HTML file that opens from disk. Interrupted? Run it again: it goes
    on where it stopped. Finished? It only writes the report anew.
    """
    from ttr_controller.pipeline.quickstart import PHASES

    run = _open(out, preset, device, budget, seed)
    _run_phases(run, tuple(PHASES))
    _write_report(run.path, None)


def train_controller(
    run_folder: RunFolder = DEFAULT_OUT,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="**pairs**: what student slots do to the final error, alone and together. **relaxed**: flips, refined "
            "by gradients through the sampler. **flips**: the final error that each student slot leaves. **probe**: "
            "the error within its own step. **budget**: distillation error against milliseconds by a knapsack, no "
            "rollout. **reinforce**: the probe, refined by policy gradient. **auto**: as quickstart.",
        ),
    ] = "pairs",
    rollouts: Annotated[
        int | None,
        typer.Option(
            "--rollouts",
            min=0,
            help="Images to sample (pairs) or to refine with (relaxed, reinforce); a gradient counts four.",
        ),
    ] = None,
    comet: Comet = False,
    trackio: Trackio = False,
) -> None:
    """Phase 2 alone: learn which layers and steps of a distilled run need full attention.

    A run whose controller was learnt by another method learns anew; interrupted, it goes on where it stopped. Metrics
    are in `controller.jsonl`. `torchrun --no-python --nproc-per-node=N ttr train-controller ...` shares the images of
    relaxed and reinforce over N processes.
    """
    from ttr_distill.comet_metrics import ControllerMetricNames
    from ttr_distill.distributed import joined

    from ttr_controller.cli.progress import phase_progress
    from ttr_controller.pipeline.quickstart import run_controller
    from ttr_controller.pipeline.run_directory import RunDirectory

    run = RunDirectory.open(run_folder)
    facts = {"phase": "controller", "method": method, "rollouts": rollouts, **asdict(run.settings)}
    trackers = open_trackers(ControllerMetricNames, run_folder, facts, comet=comet, trackio=trackio)
    with joined(run.settings.device) as world:
        if not world.main:
            run_controller(run, method, rollouts, world=world)
            return
        with phase_progress(Console(stderr=True)) as progress:
            run_controller(run, method, rollouts, progress, world=world, trackers=trackers)


def report(
    run_folder: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page; report.html in the run if left out.")
    ] = None,
) -> None:
    """Write a run's report again, also of an unfinished run."""
    _write_report(run_folder, out)


def _open(out: Path, preset: str, device: str, budget: float, seed: int) -> RunDirectory:
    """Check the settings and open or create the run."""
    from ttr_controller.pipeline.run_directory import RunDirectory
    from ttr_controller.pipeline.settings import QuickstartSettings, resolve_device

    settings = QuickstartSettings(preset=preset, device=resolve_device(device), budget_minutes=budget, seed=seed)
    return RunDirectory.open_or_create(out, settings)


def _run_phases(run: RunDirectory, names: tuple[str, ...]) -> None:
    """Run the phases that are not done yet, with a progress bar each."""
    from ttr_controller.cli.progress import phase_progress
    from ttr_controller.pipeline.quickstart import run_phases

    console = Console(stderr=True)
    with phase_progress(console) as progress:
        run_phases(run, names, progress)


def _write_report(folder: Path, out: Path | None) -> None:
    from ttr_controller.report import write_report

    path = write_report(folder, out)
    say: Callable[[str], None] = typer.echo
    say(f"report: {path.resolve()}")
