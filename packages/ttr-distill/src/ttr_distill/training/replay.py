"""Captured attention calls, kept within one budget of bytes."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor

from ttr_distill.grad import plain


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

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

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
        """Copy the sample in float32 to a device; call it inside ``training_mode``.

        Args:
            device: Where the student lives.
            rows: Batch rows to take.
        """

        def floats(tensor: Tensor) -> Tensor:
            return plain(tensor[rows], dtype=torch.float32, device=device)

        def some(queries: Queries) -> Queries:
            positions = plain(queries.positions, device=device)
            return Queries(floats(queries.q), floats(queries.target), positions)

        return replace(
            self,
            k=floats(self.k),
            v=floats(self.v),
            train=some(self.train),
            heldout=some(self.heldout),
            key_mask=None if self.key_mask is None else plain(self.key_mask[rows], device=device),
            selection=None if self.selection is None else plain(self.selection[rows], device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
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
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"a replay sample cannot be rebuilt: {error!r}") from error


class ReplayBuffer:
    """Samples of all layers within one budget of bytes.

    When room is needed, the layer with the most bytes loses its oldest sample, so that no layer pushes out another.

    Args:
        budget_bytes: The budget; positive.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._samples: dict[LayerKey, deque[tuple[int, ReplaySample]]] = {}
        self._bytes: dict[LayerKey, int] = {}
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
        incoming = {sample.layer: size}
        while self.nbytes + size > self.budget_bytes:
            self._evict(incoming)
        self._samples.setdefault(sample.layer, deque()).append((self._added, sample))
        self._bytes[sample.layer] = self._bytes.get(sample.layer, 0) + size
        self._added += 1

    def draw(self, layer: LayerKey, generator: torch.Generator) -> ReplaySample | None:
        """Return one of the layer's samples, each equally likely; ``None`` if there is none."""
        stored = self._samples.get(layer)
        if not stored:
            return None
        choice = int(torch.randint(len(stored), (1,), generator=generator))
        return stored[choice][1]

    def samples(self, layer: LayerKey | None = None) -> tuple[ReplaySample, ...]:
        """Return the samples of a layer, or all, oldest first."""
        chosen = self._samples.values() if layer is None else [self._samples.get(layer, deque())]
        return tuple(sample for _, sample in sorted((item for stored in chosen for item in stored), key=_age))

    def layer_bytes(self, layer: LayerKey) -> int:
        """Bytes of the samples of a layer."""
        return self._bytes.get(layer, 0)

    def clear(self, layer: LayerKey | None = None) -> None:
        """Drop the samples of a layer, or all."""
        for key in list(self._samples) if layer is None else [layer]:
            self._samples.pop(key, None)
            self._bytes.pop(key, None)

    def restore(self, samples: Iterable[ReplaySample]) -> None:
        """Replace the contents by these samples, oldest first."""
        self.clear()
        for sample in samples:
            self.add(sample)

    def _evict(self, incoming: Mapping[LayerKey, int]) -> None:
        def weight(layer: LayerKey) -> tuple[int, int]:
            oldest = self._samples[layer][0][0]
            return self._bytes[layer] + incoming.get(layer, 0), -oldest

        victim = max(self._samples, key=weight)
        _, sample = self._samples[victim].popleft()
        self._bytes[victim] -= sample.nbytes
        if not self._samples[victim]:
            self.clear(victim)


def _age(item: tuple[int, ReplaySample]) -> int:
    return item[0]


def _grids(entries: Iterable[tuple[int, int, int]]) -> tuple[TokenGrid, ...]:
    return tuple(TokenGrid(int(start), int(rows), int(columns)) for start, rows, columns in entries)
