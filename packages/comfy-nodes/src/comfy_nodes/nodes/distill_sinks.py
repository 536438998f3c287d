"""Where the metrics of a training go besides the file in its checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Literal

from ttr_distill.comet import CometConfig, comet_sink
from ttr_distill.comet_keys import generate_experiment_key
from ttr_distill.comet_metrics import ControllerMetricNames, DistillMetricNames, MetricNames
from ttr_distill.metrics import MetricSink

from .training_config import TrainingParameters


def sink_maker(
    parameters: TrainingParameters, phase: Literal["distill", "controller"], folder: Path
) -> Callable[[], Sequence[MetricSink]] | None:
    """Return what makes the further sinks of a run; ``None`` if none is wanted.

    All runs of one maker go to one experiment.

    Args:
        parameters: Whether Comet is wanted, and where to.
        phase: Which names metrics have there.
        folder: Of the checkpoint; archives go there when Comet cannot be reached.
    """
    if not parameters.comet_enabled:
        return None
    config = CometConfig(
        project=parameters.comet_project_name or TrainingParameters().comet_project_name,
        workspace=parameters.comet_workspace,
        experiment=parameters.comet_experiment or generate_experiment_key(folder, datetime.now().astimezone()),
        offline_folder=folder / "comet-offline",
        parameters={"flux2ttr_phase": phase, **asdict(parameters)},
    )

    def make() -> Sequence[MetricSink]:
        names: MetricNames = (
            DistillMetricNames(parameters.log_every)
            if phase == "distill"
            else ControllerMetricNames(parameters.log_every)
        )
        return (comet_sink(names, config),)

    return make
