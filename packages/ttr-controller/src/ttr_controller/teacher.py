"""Results of exact sampling, kept so that every rollout of the same prompt and noise shares one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from attn_dispatch.call import StepContext
from torch import Tensor

from ttr_controller.rollout import ContextRecorder, Sampler

Size = tuple[int, int] | None


@dataclass(frozen=True)
class TeacherSamples:
    """Exact results of a batch.

    Attributes:
        latent: ``[B, ...]``.
        images: ``[B, 3, H, W]`` in [0, 1].
    """

    latent: Tensor
    images: Tensor


@runtime_checkable
class Sized(Protocol):
    """A sampler whose image size can change."""

    @property
    def rows(self) -> int:
        """Rows of tokens."""
        ...

    @property
    def columns(self) -> int:
        """Columns of tokens."""
        ...


class TeacherCache:
    """Samples with exact attention, once per prompt, seed and size.

    Args:
        sampler: Makes the samples.
        capacity: Results kept; the one unused for longest goes first.
    """

    def __init__(self, sampler: Sampler, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"a teacher cache keeps at least one result, got capacity {capacity}")
        self._sampler = sampler
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, int, Size], tuple[Tensor, Tensor]] = OrderedDict()
        self._contexts: dict[Size, tuple[StepContext, ...]] = {}

    @property
    def contexts(self) -> tuple[StepContext, ...]:
        """Diffusion steps of the sampler's runs at its size, known after the first sample."""
        return self._contexts.get(self._size(), ())

    def get(self, prompts: Sequence[str], seeds: Sequence[int]) -> TeacherSamples:
        """Return the exact results of a batch, sampling those that are missing."""
        size = self._size()
        pairs = [(prompt, seed, size) for prompt, seed in zip(prompts, seeds, strict=True)]
        wanted: dict[tuple[str, int, Size], tuple[Tensor, Tensor]] = {}
        for pair in pairs:
            if pair in self._kept:
                self._kept.move_to_end(pair)
                wanted[pair] = self._kept[pair]
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in wanted]
        if missing:
            recorder = ContextRecorder()
            made = self._sampler.sample([pair[0] for pair in missing], [pair[1] for pair in missing], recorder)
            self._contexts[size] = recorder.contexts
            for row, pair in enumerate(missing):
                wanted[pair] = (made.latent[row].clone(), made.images[row].clone())
                self._kept[pair] = wanted[pair]
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        latents, images = zip(*(wanted[pair] for pair in pairs), strict=True)
        return TeacherSamples(torch.stack(latents), torch.stack(images))

    def _size(self) -> Size:
        """Tokens of the sampler's images now; a sampler that does not tell has one size."""
        return (self._sampler.rows, self._sampler.columns) if isinstance(self._sampler, Sized) else None
