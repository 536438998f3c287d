"""Trackers on the command line: Comet and Trackio, beside the file of metrics that every training writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ttr_distill.comet_metrics import MetricNames
    from ttr_distill.metrics import QueuedSink

Comet = Annotated[
    bool,
    typer.Option("--comet", help="Send metrics to Comet too (key in `COMET_API_KEY`), or into `comet-offline/`."),
]
Trackio = Annotated[bool, typer.Option("--trackio", help="Keep metrics for the local dashboard `trackio show` too.")]


def open_trackers(
    make_names: Callable[[], MetricNames],
    folder: Path,
    parameters: Mapping[str, object],
    *,
    comet: bool,
    trackio: bool,
) -> tuple[QueuedSink, ...]:
    """Make the trackers that the command line asks for; nothing is connected or started before the first row.

    Args:
        make_names: Names the metrics of one tracker and keeps its cadence.
        folder: Of the run; archives of Comet go there when it cannot be reached.
        parameters: Settings of the run to show.
        comet: Whether Comet is wanted.
        trackio: Whether Trackio is wanted.

    Raises:
        RunError: A package is missing; the message names the extra to install.
    """
    from ttr_distill.comet import CometConfig, comet_sink
    from ttr_distill.trackio import TrackioConfig, trackio_sink

    from ttr_controller.pipeline.settings import RunError

    for wanted, option, package in ((comet, "comet", "comet_ml"), (trackio, "trackio", "trackio")):
        if wanted and find_spec(package) is None:
            raise RunError(f"--{option} needs the package {package}; install ttr-distill[{option}]")
    made: list[QueuedSink] = []
    if comet:
        config = CometConfig(offline_folder=folder / "comet-offline", parameters=parameters)
        made.append(comet_sink(make_names(), config))
    if trackio:
        made.append(trackio_sink(make_names(), TrackioConfig(parameters=parameters)))
    return tuple(made)
