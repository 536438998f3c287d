"""Keeps metrics for Trackio, whose dashboard runs on the same machine without an account: ``trackio show``."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from ttr_distill.comet import flatten_parameters
from ttr_distill.comet_keys import display_name
from ttr_distill.comet_metrics import MetricNames, Record
from ttr_distill.metrics import MetricValue, QueuedSink


class Run(Protocol):
    """The part of a Trackio run that is used."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Store metrics of a step."""
        ...

    def finish(self) -> None:
        """Finish."""
        ...


@dataclass(frozen=True)
class TrackioConfig:
    """Where a run goes; the environment variable ``TRACKIO_DIR`` names the folder.

    Attributes:
        project: Trackio project.
        name: Name of the run; empty = date, time and commit. The same name goes on with the same run.
        anchor: Path whose commit is named.
        parameters: Settings to store; see ``flatten_parameters``.
    """

    project: str = "ttr-distillation"
    name: str = ""
    anchor: Path = Path(__file__)
    parameters: Mapping[str, object] = field(default_factory=dict)


class TrackioSink:
    """Writes records to a run; made and used on the thread of ``trackio_sink``.

    Args:
        names: Names the metrics and keeps the cadence.
        run: A started run.
    """

    def __init__(self, names: MetricNames, run: Run) -> None:
        self._names = names
        self._run = run

    def write(self, row: Mapping[str, MetricValue]) -> None:
        """Store what is due."""
        self._store(self._names.take(row))

    def close(self) -> None:
        """Store what is left and finish the run."""
        self._store(self._names.final())
        self._run.finish()

    def _store(self, record: Record | None) -> None:
        if record is not None:
            self._run.log(record.metrics, step=record.step)


def trackio_sink(names: MetricNames, config: TrackioConfig | None = None) -> QueuedSink:
    """Make a sink that stores for Trackio; returns at once, and never raises because of Trackio.

    Args:
        names: ``DistillMetricNames`` or ``ControllerMetricNames``.
        config: Where to.
    """
    settings = config or TrackioConfig()
    return QueuedSink(lambda: _open(names, settings), name="Trackio")


def _open(names: MetricNames, config: TrackioConfig) -> TrackioSink:
    try:
        trackio = importlib.import_module("trackio")
    except ImportError as error:
        raise ImportError("the package trackio is missing; install ttr-distill[trackio]") from error
    run: Run = trackio.init(
        project=config.project,
        name=config.name or display_name(config.anchor, datetime.now()),
        config=dict(flatten_parameters(config.parameters)),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return TrackioSink(names, run)
