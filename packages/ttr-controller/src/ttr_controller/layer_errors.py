"""How far each layer's students are from the teacher's attention, by noise level: what distillation knows for free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attn_dispatch.call import AttentionCall, LayerKey, NativeAttention, StepContext
from attn_dispatch.router import Backend
from torch import Tensor

from ttr_controller.rollout import Sampler, step_key


class LayerErrorMeter:
    """Attention handler that answers exactly and measures a backend on the same calls, all queries.

    Args:
        backend: The students.
        layers: Layers to measure.
    """

    def __init__(self, backend: Backend, layers: Sequence[LayerKey]) -> None:
        self._backend = backend
        self._index = {layer: position for position, layer in enumerate(layers)}
        self._sums: dict[StepContext, Tensor] = {}

    def begin_run(self) -> None:
        """Runs add up."""

    def end_run(self) -> None:
        """Runs add up."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer with ``native(call)``."""
        exact = native(call)
        position = None if call.layer is None else self._index.get(call.layer)
        if position is not None and call.step is not None and self._backend.refuses(call) is None:
            with torch.no_grad():
                answer = self._backend(call).float()
                error = (answer - exact.float()).square().sum()
                pair = torch.stack([error, exact.float().square().sum()]).double().cpu()
            table = self._sums.setdefault(step_key(call.step), torch.zeros(2, len(self._index), dtype=torch.float64))
            table[:, position] += pair
        return exact

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels seen, in order of appearance."""
        return tuple(step.sigma for step in self._sums)

    def errors(self) -> Tensor:
        """Relative L2 error ``[steps, L]`` float32 of the backend's answers; 0 where it never answered.

        Raises:
            ValueError: Nothing was measured.
        """
        if not self._sums:
            raise ValueError("no attention call was measured; sample with this handler first")
        tables = torch.stack(list(self._sums.values()))
        return (tables[:, 0] / tables[:, 1].clamp_min(1e-30)).sqrt().float()


def measure_layer_errors(
    sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], backend: Backend
) -> LayerErrorMeter:
    """Measure a backend along exact sampling; costs no rollout."""
    meter = LayerErrorMeter(backend, sampler.layers)
    sampler.sample(prompts, seeds, meter)
    return meter
