"""Captured attention calls, kept within one budget of bytes."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor

from ttr_distill.training.offload import Arrival


@dataclass(frozen=True, eq=False)
class Queries:
    """Some queries of a call and what the teacher answered them.

    Attributes:
        q: ``[B, H, Nq, D]``, after RoPE.
        target: ``[B, H, Nq, Dv]``, the teacher's output.
        positions: ``[Nq]`` int64, which tokens they are.
    """

    q: Tensor
    target: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class ReplaySample:
    """One captured call: all keys and values, a few queries to train on and a few that are never trained on.

    Attributes:
        layer: Which layer was called.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        train: Queries to train on.
        heldout: Queries to measure on.
        layout: Where text and image tokens lie.
        scale: Score scale of the call.
        step: Diffusion step of the call.
        key_mask: ``[B, Nk]`` bool, True = keep.
        selection: What the student chose for the whole call; see ``StudentAttention.select``.
        trainable: False for a call of a held-out diffusion step: it is measured on, never trained on.
        arrival: When the tensors have reached host memory; ``None`` = they have.
    """

    layer: LayerKey
    k: Tensor
    v: Tensor
    train: Queries
    heldout: Queries
    layout: TokenLayout
    scale: float | None = None
    step: StepContext | None = None
    key_mask: Tensor | None = None
    selection: Tensor | None = None
    trainable: bool = True
    arrival: Arrival | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(_bytes(tensor) for tensor in self._tensors().values())

    def call(self, queries: Queries) -> AttentionCall:
        """Return the attention call of some of the sample's queries."""
        return AttentionCall(
            q=queries.q,
            k=self.k,
            v=self.v,
            scale=self.scale,
            key_mask=self.key_mask,
            layer=self.layer,
            step=self.step,
            layout=self.layout,
        )

    def moved(self, device: torch.device, rows: slice = slice(None)) -> "ReplaySample":
        """Give the sample in float32 on a device; call it inside ``training_mode``.

        What is there in float32 already is not copied: nothing that trains changes a sample. Pinned host memory is
        read while the device goes on computing.

        Args:
            device: Where the student lives.
            rows: Batch rows to take.
        """
        if self.arrival is not None:
            self.arrival.before_use_on(device)

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())

        def floats(tensor: Tensor) -> Tensor:
            return there(tensor[rows]).to(torch.float32)

        def some(queries: Queries) -> Queries:
            return Queries(floats(queries.q), floats(queries.target), there(queries.positions))

        return replace(
            self,
            k=floats(self.k),
            v=floats(self.v),
            train=some(self.train),
            heldout=some(self.heldout),
            key_mask=None if self.key_mask is None else there(self.key_mask[rows]),
            selection=None if self.selection is None else there(self.selection[rows]),
            arrival=None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; waits until they have arrived."""
        if self.arrival is not None:
            self.arrival.wait()
        return self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k, "v": self.v, "key_mask": self.key_mask, "selection": self.selection}
        for name, queries in (("train", self.train), ("heldout", self.heldout)):
            named |= {f"{name}.{item.name}": getattr(queries, item.name) for item in fields(Queries)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def facts(self) -> dict[str, object]:
        """Return everything but the tensors as JSON values; ``from_parts`` reads both."""
        layout, step = self.layout, self.step
        return {
            "layer": str(self.layer),
            "scale": self.scale,
            "trainable": self.trainable,
            "layout": {
                "length": layout.length,
                "text": [list(span) for span in layout.text],
                "grids": [[grid.start, grid.rows, grid.columns] for grid in layout.grids],
                "references": [[grid.start, grid.rows, grid.columns] for grid in layout.references],
            },
            "step": None
            if step is None
            else [step.sigma, step.cfg_scale, list(step.latent_size), list(step.cond_or_uncond)],
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> "ReplaySample":
        """Rebuild a sample from ``tensors()`` and ``facts()``.

        Raises:
            ValueError: Something is missing or malformed.
        """
        try:
            layout, step = facts["layout"], facts["step"]
            if not isinstance(layout, Mapping):
                raise TypeError("layout is not an object")
            scale = facts["scale"]
            return cls(
                layer=LayerKey.parse(str(facts["layer"])),
                k=tensors["k"],
                v=tensors["v"],
                train=Queries(*(tensors[f"train.{item.name}"] for item in fields(Queries))),
                heldout=Queries(*(tensors[f"heldout.{item.name}"] for item in fields(Queries))),
                layout=TokenLayout(
                    int(layout["length"]),
                    tuple((int(start), int(stop)) for start, stop in layout["text"]),
                    _grids(layout["grids"]),
                    _grids(layout["references"]),
                ),
                scale=float(scale) if isinstance(scale, int | float) else None,
                step=StepContext(step[0], step[1], tuple(step[2]), tuple(step[3])) if isinstance(step, list) else None,
                key_mask=tensors.get("key_mask"),
                selection=tensors.get("selection"),
                trainable=bool(facts.get("trainable", True)),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"a replay sample cannot be rebuilt: {error!r}") from error


class ReplayBuffer:
    """Samples of all layers within one budget of bytes.

    When room is needed, the layer with the most bytes loses its oldest sample, so that no layer pushes out another.
    A tensor that several samples share, such as the keys and values of one call, counts once.

    Args:
        budget_bytes: The budget; positive.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._samples: dict[LayerKey, deque[tuple[int, ReplaySample]]] = {}
        self._bytes: dict[LayerKey, int] = {}
        self._users: Counter[int] = Counter()
        self._added = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return sum(self._bytes.values())

    def add(self, sample: ReplaySample) -> None:
        """Take a sample, after making room for it.

        Raises:
            ValueError: The sample alone is larger than the budget; nothing was removed.
        """
        size = sample.nbytes
        if size > self.budget_bytes:
            raise ValueError(
                f"one replay sample of layer {sample.layer} takes {size} bytes, the budget is {self.budget_bytes}; "
                f"set replay_bytes to at least {size}, or lower query_cap"
            )
        while self.nbytes + self._growth(sample) > self.budget_bytes:
            self._evict(sample)
        self._samples.setdefault(sample.layer, deque()).append((self._added, sample))
        self._bytes[sample.layer] = self._bytes.get(sample.layer, 0) + self._growth(sample)
        self._users.update(id(tensor) for tensor in sample._tensors().values())
        self._added += 1

    def draw(self, layer: LayerKey, generator: torch.Generator) -> ReplaySample | None:
        """Return one of the layer's trainable samples, each equally likely; ``None`` if there is none."""
        stored = [sample for _, sample in self._samples.get(layer, ()) if sample.trainable]
        if not stored:
            return None
        return stored[int(torch.randint(len(stored), (1,), generator=generator))]

    def samples(self, layer: LayerKey | None = None) -> tuple[ReplaySample, ...]:
        """Return the samples of a layer, or all, oldest first."""
        chosen = self._samples.values() if layer is None else [self._samples.get(layer, deque())]
        return tuple(sample for _, sample in sorted((item for stored in chosen for item in stored), key=_age))

    def layer_bytes(self, layer: LayerKey) -> int:
        """Bytes of the samples of a layer."""
        return self._bytes.get(layer, 0)

    def clear(self, layer: LayerKey | None = None, *, keep: int = 0) -> None:
        """Drop the samples of a layer, or of all, but the newest ``keep`` of each."""
        for key in list(self._samples) if layer is None else [layer]:
            while len(self._samples.get(key, ())) > keep:
                self._drop_oldest(key)

    def restore(self, samples: Iterable[ReplaySample]) -> None:
        """Replace the contents by these samples, oldest first."""
        self.clear()
        for sample in samples:
            self.add(sample)

    def _growth(self, sample: ReplaySample) -> int:
        """Bytes of the tensors that no stored sample has."""
        return sum(_bytes(tensor) for tensor in sample._tensors().values() if not self._users[id(tensor)])

    def _evict(self, incoming: ReplaySample) -> None:
        growth = self._growth(incoming)

        def weight(layer: LayerKey) -> tuple[int, int]:
            oldest = self._samples[layer][0][0]
            return self._bytes[layer] + (growth if layer == incoming.layer else 0), -oldest

        self._drop_oldest(max(self._samples, key=weight))

    def _drop_oldest(self, layer: LayerKey) -> None:
        _, sample = self._samples[layer].popleft()
        self._users.subtract(id(tensor) for tensor in sample._tensors().values())
        self._users = +self._users
        self._bytes[layer] -= self._growth(sample)
        if not self._samples[layer]:
            del self._samples[layer], self._bytes[layer]


def _age(item: tuple[int, ReplaySample]) -> int:
    return item[0]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _grids(entries: Iterable[tuple[int, int, int]]) -> tuple[TokenGrid, ...]:
    return tuple(TokenGrid(int(start), int(rows), int(columns)) for start, rows, columns in entries)
