"""Sends metrics to Comet, or into an offline archive where there is no key or no network.

Everything of Comet happens on a thread of its own: importing, connecting, sending. The key comes from the environment
(``COMET_API_KEY``) or from Comet's own settings file, never from an argument, and is written nowhere.
"""

import importlib
import logging
import os
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Protocol, cast
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit

from ttr_distill.comet_keys import display_name, generate_experiment_key, normalize_experiment_key
from ttr_distill.comet_metrics import MetricNames, Record
from ttr_distill.metrics import MetricValue, QueuedSink

logger = logging.getLogger(__name__)

KEY_VARIABLE = "COMET_API_KEY"
_SERVER = urlunsplit(("https", "www.comet.com", "", "", ""))
_ALIVE = "/clientlib/isAlive/ver"
_REACH_SECONDS = 5.0
_SECRET_WORDS = ("api_key", "apikey", "token", "secret", "password")


class Experiment(Protocol):
    """The part of a Comet experiment that is used."""

    alive: bool

    def get_key(self) -> str:
        """Return the experiment's key."""
        ...

    def log_metrics(self, dic: Mapping[str, float], *, step: int) -> None:
        """Send metrics of a step."""
        ...

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Send settings."""
        ...

    def end(self) -> object:
        """Finish."""
        ...


@dataclass(frozen=True)
class CometConfig:
    """Where an experiment goes.

    Attributes:
        project: Comet project.
        workspace: Comet workspace; empty = the account's own.
        experiment: Key of the experiment, any text (see ``normalize_experiment_key``); the same key goes on with the
            same experiment. Empty = a new one.
        name: Name that Comet shows; empty = date, time and commit.
        offline_folder: Where archives of offline experiments go; ``comet upload`` sends them later.
        anchor: Path whose commit is named.
        parameters: Settings to log; nested mappings become dotted names, anything that looks like a secret is left out.
    """

    project: str = "ttr-distillation"
    workspace: str = ""
    experiment: str = ""
    name: str = ""
    offline_folder: Path = Path("comet-offline")
    anchor: Path = Path(__file__)
    parameters: Mapping[str, object] = field(default_factory=dict)


class CometSink:
    """Writes records to an experiment; made and used on the thread of ``comet_sink``.

    Args:
        names: Names the metrics and keeps the cadence.
        experiment: A started experiment.
        failures: What Comet raises on its own; turned into ``RuntimeError``.
    """

    def __init__(self, names: MetricNames, experiment: Experiment, failures: type[Exception]) -> None:
        self._names = names
        self._experiment = experiment
        self._failures = failures

    def write(self, row: Mapping[str, MetricValue]) -> None:
        """Send what is due."""
        self._send(self._names.take(row))

    def close(self) -> None:
        """Send what is left and end the experiment."""
        self._send(self._names.final())
        self._experiment.end()

    def _send(self, record: Record | None) -> None:
        if record is None:
            return
        try:
            self._experiment.log_metrics(record.metrics, step=record.step)
        except self._failures as error:
            raise RuntimeError(f"Comet took no metrics: {error}") from None


def comet_sink(names: MetricNames, config: CometConfig | None = None) -> QueuedSink:
    """Make a sink that sends to Comet; returns at once, and never raises because of Comet.

    Args:
        names: ``DistillMetricNames`` or ``ControllerMetricNames``.
        config: Where to.
    """
    settings = config or CometConfig()
    return QueuedSink(lambda: _open(names, settings), name="Comet")


def flatten_parameters(parameters: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield settings under dotted names, sequences as text; names that look like secrets are left out."""
    for name, value in parameters.items():
        if any(word in name.lower().replace("-", "_") for word in _SECRET_WORDS):
            continue
        if isinstance(value, Mapping):
            yield from flatten_parameters(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple | set | frozenset):
            yield f"{prefix}{name}", ",".join(str(item) for item in value)
        else:
            yield f"{prefix}{name}", value


def reachable(server: str, seconds: float = _REACH_SECONDS) -> bool:
    """Return whether a Comet server answers within some seconds, whatever it answers; proxies are honoured.

    Starting an experiment on a server that does not answer blocks for up to two minutes.
    """
    parts = urlsplit(server)
    alive = urlunsplit((parts.scheme, parts.netloc, _ALIVE, "", ""))
    try:
        with urllib.request.urlopen(alive, timeout=seconds):
            return True
    except HTTPError:
        return True
    except (OSError, ValueError, HTTPException):
        return False


def _open(names: MetricNames, config: CometConfig) -> CometSink:
    # Comet would otherwise patch the libraries that are loaded after it.
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
    try:
        comet = importlib.import_module("comet_ml")
    except ImportError as error:
        raise ImportError("the package comet_ml is missing; install ttr-distill[comet]") from error
    failures = cast("type[Exception]", importlib.import_module("comet_ml.exceptions").CometException)
    settings = comet.get_config()
    key = str(os.environ.get(KEY_VARIABLE) or settings["comet.api_key"] or "")
    reason = f"no Comet key ({KEY_VARIABLE})" if not key else ""
    if key and not reachable(str(settings["comet.url_override"] or _SERVER)):
        reason = "Comet cannot be reached"
    try:
        experiment = None if reason else _start(config, online=True)
        if experiment is not None and not experiment.alive:
            reason = "Comet took no experiment"
    except (failures, OSError, ValueError) as error:
        reason = f"Comet took no experiment ({str(error).replace(key, '...')})"
    if reason:
        logger.warning("%s: metrics go to %s, for comet upload", reason, config.offline_folder)
        experiment = None
    try:
        experiment = experiment or _start(config, online=False)
        shown = {
            name: value
            for name, value in flatten_parameters(config.parameters)
            if not key or key not in f"{name} {value}"
        }
        experiment.log_parameters({**shown, "comet_experiment": experiment.get_key()})
    except failures as error:
        raise RuntimeError(str(error)) from None
    return CometSink(names, experiment, failures)


def _start(config: CometConfig, *, online: bool) -> Experiment:
    comet = importlib.import_module("comet_ml")
    now = datetime.now()
    wanted = normalize_experiment_key(config.experiment, allow_empty=True)
    if not online:
        config.offline_folder.mkdir(parents=True, exist_ok=True)
    quiet = comet.ExperimentConfig(
        disabled=False,
        offline_directory=str(config.offline_folder),
        name=config.name or display_name(config.anchor, now),
        log_code=False,
        log_git_metadata=False,
        log_git_patch=False,
        log_env_details=False,
        parse_args=False,
        auto_output_logging=False,
        auto_param_logging=False,
        auto_metric_logging=False,
        display_summary_level=0,
    )
    experiment: Experiment = comet.start(
        workspace=config.workspace or None,
        project_name=config.project,
        experiment_key=wanted or generate_experiment_key(config.anchor, now),
        mode="get_or_create" if wanted else "create",
        online=online,
        experiment_config=quiet,
    )
    return experiment
