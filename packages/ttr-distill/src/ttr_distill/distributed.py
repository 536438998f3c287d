"""Several processes, on one machine or many, that train together; started by ``torchrun``, alone without it."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from attn_dispatch import LayerKey
from torch import Tensor
from torch import distributed as dist

from ttr_distill.grad import training_mode
from ttr_distill.metrics import MetricSink, MetricValue
from ttr_distill.training.distiller import Distiller

T = TypeVar("T")
Sharing = Literal["layers", "images"]
_FIRST = 0


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Collective methods are called by all of them, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a constant

    @property
    def main(self) -> bool:
        """Whether this process is the one that logs and saves."""
        return self.rank == _FIRST

    def share(self, items: Sequence[T]) -> tuple[T, ...]:
        """Return this process's part of a sequence: each item is in exactly one part."""
        return tuple(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes in the order of their ranks; collective."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value)
        return found

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in one transfer per data type; collective."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_dtype[tensor.dtype].append(tensor)
        for members in by_dtype.values():
            flat = torch.cat([member.detach().reshape(-1) for member in members])
            dist.all_reduce(flat)
            _write(members, flat / self.size)

    def broadcast_(self, tensors: Sequence[Tensor], source: int = _FIRST) -> None:
        """Replace tensors, all of one data type, by those of the process ``source``; collective."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([member.detach().reshape(-1) for member in tensors])
        dist.broadcast(flat, source)
        _write(tensors, flat)

    def wait(self) -> None:
        """Return when every process is here; collective."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(
    device: torch.device | str = "cpu",
    *,
    environment: Mapping[str, str] | None = None,
    init_method: str = "env://",
) -> Iterator[World]:
    """Join the processes that ``torchrun`` started; without it this one is alone and nothing is initialised.

    Tensors on the host travel by gloo, tensors on CUDA devices by NCCL.

    Args:
        device: Where to compute; on ``"cuda"`` every process of a machine takes a device of its own.
        environment: ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; the process's own if ``None``.
        init_method: Where the processes meet.
    """
    found = os.environ if environment is None else environment
    size, wanted = int(found.get("WORLD_SIZE", "1")), torch.device(device)
    if size == 1:
        yield World(device=wanted)
        return
    rank, local = int(found["RANK"]), int(found.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if wanted.type == "cuda":
        wanted, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(wanted)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
    try:
        yield World(rank, size, wanted)
    finally:
        dist.destroy_process_group()


class Team:
    """Keeps the distillers of all processes together.

    ``"layers"``: every process samples the same images and trains its own layers. The students are those that one
    process would have trained, as long as the replay budget holds all samples.

    ``"images"``: every process samples its own images and trains all layers; after every round weights and moments
    become their mean, and readiness gets the measurements of all.

    Args:
        world: The processes.
        distiller: Of this process. It has no sinks: rows go through the team.
        sharing: What is divided.
        sinks: Get the rows of all processes; used by the main one.

    Raises:
        ValueError: The distiller trains layers of another process, or has sinks.
    """

    def __init__(
        self, world: World, distiller: Distiller, sharing: Sharing = "layers", *, sinks: Sequence[MetricSink] = ()
    ) -> None:
        expected = own_layers(world, distiller.bank.layers, sharing)
        if set(distiller.layers) != set(expected):
            raise ValueError(
                f"rank {world.rank} must train {sorted(map(str, expected))}; give them as Distiller(layers=)"
            )
        if distiller.sinks:
            raise ValueError("give the sinks to the Team, not to the Distiller")
        self.world = world
        self.distiller = distiller
        self.sharing = sharing
        self.sinks = tuple(sinks)
        if sharing == "images" and world.size > 1:
            distiller.exchange = lambda measured: [one for part in world.gather(measured) for one in part]

    def end_round(self) -> None:
        """Bring all processes to the same students and readiness, and log; call it after every run, collective."""
        self.collect()
        self._log()

    def collect(self) -> None:
        """Bring all processes to the same students and readiness; collective."""
        if self.world.size > 1:
            with training_mode():
                if self.sharing == "layers":
                    self._collect_layers()
                else:
                    self._average()

    def _collect_layers(self) -> None:
        distiller, bank = self.distiller, self.distiller.bank
        for place, layer in enumerate(bank.layers):
            self.world.broadcast_(list(bank[layer].state_dict().values()), place % self.world.size)
        states = {layer: state for layer, state in distiller.layer_states().items() if layer in distiller.layers}
        own = {str(layer) for layer in distiller.layers}
        judged = {name: entry for name, entry in distiller.readiness.state_dict().items() if name in own}
        merged: dict[str, object] = {}
        for rank, (theirs, optimisers) in enumerate(self.world.gather((judged, states))):
            merged |= theirs
            # The main process saves: it needs what the others' optimisers remember.
            if self.world.main and rank != self.world.rank:
                with training_mode():
                    for layer, (tensors, counters) in optimisers.items():
                        distiller.layer_training(layer).restore(tensors, counters)
        distiller.readiness.load_state_dict(merged)

    def _average(self) -> None:
        tensors: list[Tensor] = []
        for layer in self.distiller.bank.layers:
            tensors += self.distiller.layer_training(layer).shared_tensors()
        self.world.mean_(tensors)

    def _log(self) -> None:
        rows = [row for row in self.distiller.metrics if row["run"] == self.distiller.runs]
        parts = self.world.gather(rows)
        if self.world.main:
            for sink in self.sinks:
                for row in _joined_rows(parts):
                    sink.write(row)


def own_layers(world: World, layers: Sequence[LayerKey], sharing: Sharing = "layers") -> tuple[LayerKey, ...]:
    """Return the layers that this process trains."""
    return world.share(layers) if sharing == "layers" else tuple(layers)


def _joined_rows(parts: Sequence[Sequence[Mapping[str, MetricValue]]]) -> list[dict[str, MetricValue]]:
    """One row per layer: fractions are means over the processes that have the layer, all else is the first's."""
    by_layer: dict[MetricValue, list[Mapping[str, MetricValue]]] = defaultdict(list)
    for part in parts:
        for row in part:
            by_layer[row["layer"]].append(row)
    joined_rows: list[dict[str, MetricValue]] = []
    for _, rows in sorted(by_layer.items(), key=lambda item: str(item[0])):
        row = dict(rows[0])
        for name in row:
            values = [value for value in (other[name] for other in rows) if isinstance(value, float)]
            row[name] = sum(values) / len(values) if values else row[name]
        joined_rows.append(row)
    return joined_rows


def _write(tensors: Sequence[Tensor], flat: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
