"""Learns students from recorded calls, epoch after epoch, without a sampler."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from attn_dispatch import LayerKey

from ttr_distill.seeding import stream
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.replay import Queries, ReplaySample


class Recording(Protocol):
    """Recorded samples, by layer and number."""

    @property
    def layers(self) -> Sequence[LayerKey]:
        """Layers with samples."""
        ...

    def trainable(self, layer: LayerKey) -> Sequence[int]:
        """Numbers of the layer's samples that may be trained on."""
        ...

    def heldout(self, layer: LayerKey) -> Sequence[int]:
        """Numbers of the layer's samples that are only measured on."""
        ...

    def load(self, layer: LayerKey, number: int) -> ReplaySample:
        """Read one sample."""
        ...


@dataclass(frozen=True)
class CalibrateConfig:
    """How recorded samples are gone through.

    Attributes:
        epochs: Passes over all trainable samples, those of an interrupted calibration included.
        queries_per_update: Draw so many of a sample's training queries for each update; ``None`` = all of them.
    """

    epochs: int = 4
    queries_per_update: int | None = 128

    def __post_init__(self) -> None:
        if self.epochs < 1 or (self.queries_per_update is not None and self.queries_per_update < 1):
            raise ValueError(
                f"epochs and queries_per_update must be at least 1, got {self.epochs} and {self.queries_per_update}"
            )


def calibrate(
    distiller: Distiller,
    recording: Recording,
    config: CalibrateConfig | None = None,
    *,
    on_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train every layer of a recording; equal recordings and seeds give equal students.

    An epoch is a run of the distiller: its held-out samples are measured after the updates, readiness and metrics get
    one value a layer, and ``distiller.runs`` epochs are done. A distiller restored from a state goes on with the next.

    Args:
        distiller: Trains; its ``layers`` are taken.
        recording: What it learns from.
        config: How.
        on_epoch: Called after each epoch with its number, from 1; the place to save.

    Raises:
        ValueError: The recording lacks a layer, or cannot be read.
        RuntimeError: Training failed.
    """
    config = config or CalibrateConfig()
    missing = [str(layer) for layer in distiller.layers if layer not in recording.layers]
    if missing:
        raise ValueError(f"the recording has no calls of layer {', '.join(missing)}")
    while distiller.runs < config.epochs:
        distiller.begin_run()
        for layer in distiller.layers:
            for sample in _epoch(recording, layer, config, distiller.seed, distiller.runs):
                distiller.study(sample)
        distiller.end_run()
        distiller.raise_pending()
        if on_epoch is not None:
            on_epoch(distiller.runs)


def heldout_samples(recording: Recording, layer: LayerKey) -> Iterator[ReplaySample]:
    """Read the samples that judge a layer: the held-out ones, or all if there is none."""
    for number in recording.heldout(layer) or recording.trainable(layer):
        yield recording.load(layer, number)


def _epoch(
    recording: Recording, layer: LayerKey, config: CalibrateConfig, seed: int, epoch: int
) -> Iterator[ReplaySample]:
    draw = stream(seed, "epoch", epoch, layer)
    numbers = recording.trainable(layer)
    for place in torch.randperm(len(numbers), generator=draw).tolist():
        yield _thinned(recording.load(layer, numbers[place]), config.queries_per_update, draw)
    for sample in heldout_samples(recording, layer):
        yield replace(sample, trainable=False)


def _thinned(sample: ReplaySample, count: int | None, draw: torch.Generator) -> ReplaySample:
    """Keep some of a sample's training queries."""
    queries = sample.train
    available = queries.positions.numel()
    if available <= (count or math.inf):
        return sample
    chosen = torch.randperm(available, generator=draw)[:count].sort().values
    q, target = queries.q.index_select(2, chosen), queries.target.index_select(2, chosen)
    return replace(sample, train=Queries(q, target, queries.positions[chosen]))
