"""Results of exact sampling, kept so that every rollout of the same prompt and noise shares one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from attn_dispatch.call import StepContext
from torch import Tensor

from ttr_controller.rollout import ContextRecorder, Sampler


@dataclass(frozen=True)
class TeacherSamples:
    """Exact results of a batch.

    Attributes:
        latent: ``[B, ...]``.
        images: ``[B, 3, H, W]`` in [0, 1].
    """

    latent: Tensor
    images: Tensor


class TeacherCache:
    """Samples with exact attention, once per prompt and seed.

    Args:
        sampler: Makes the samples.
        capacity: Results kept; the one unused for longest goes first.
    """

    def __init__(self, sampler: Sampler, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"a teacher cache keeps at least one result, got capacity {capacity}")
        self._sampler = sampler
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, int], tuple[Tensor, Tensor]] = OrderedDict()
        self.contexts: tuple[StepContext, ...] = ()
        """Diffusion steps of the sampler's runs, known after the first sample."""

    def get(self, prompts: Sequence[str], seeds: Sequence[int]) -> TeacherSamples:
        """Return the exact results of a batch, sampling those that are missing."""
        pairs = list(zip(prompts, seeds, strict=True))
        wanted: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        for pair in pairs:
            if pair in self._kept:
                self._kept.move_to_end(pair)
                wanted[pair] = self._kept[pair]
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in wanted]
        if missing:
            recorder = ContextRecorder()
            made = self._sampler.sample([prompt for prompt, _ in missing], [seed for _, seed in missing], recorder)
            self.contexts = recorder.contexts
            for row, pair in enumerate(missing):
                wanted[pair] = (made.latent[row].clone(), made.images[row].clone())
                self._kept[pair] = wanted[pair]
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        latents, images = zip(*(wanted[pair] for pair in pairs), strict=True)
        return TeacherSamples(torch.stack(latents), torch.stack(images))
