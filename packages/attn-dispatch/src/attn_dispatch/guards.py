"""Whether a backend may answer a call: limits on layers, noise levels and sizes.

A guard reads only what the call says about itself, never tensor values, and answers ``None`` or one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attn_kernels.cost import AttentionShape, Estimate, pays_off
from attn_kernels.device_model import DeviceModel, Work

from attn_dispatch.call import AttentionCall, LayerKey

NO_LAYER = "the host does not name the layer"
NO_SIGMA = "the host does not tell the noise level"

_MOST_ESTIMATES = 4096


@dataclass(frozen=True)
class LayerRange:
    """Allow the layers ``first`` to ``last``, both included.

    Attributes:
        first: A ``LayerKey``, or an index within the stream.
        last: As ``first``. Two keys are compared by stream name, then index, which is the order of a Flux model
            (all ``double`` blocks run before the ``single`` ones).
        stream: The only allowed stream; ``None`` = any. Only with indices.
    """

    first: LayerKey | int
    last: LayerKey | int
    stream: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.first, LayerKey) and isinstance(self.last, LayerKey):
            if self.stream is not None:
                raise ValueError(f"first and last name their streams already; leave out stream={self.stream!r}")
            empty = self.last < self.first
        elif isinstance(self.first, int) and isinstance(self.last, int):
            empty = self.first < 0 or self.last < self.first
        else:
            raise ValueError(f"first and last must both be layer keys or both be indices, got {self}")
        if empty:
            raise ValueError(f"a layer range needs 0 <= first <= last, got {self.first} to {self.last}")

    def __str__(self) -> str:
        return f"{'' if self.stream is None else self.stream + ':'}{self.first}..{self.last}"

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call's layer is not allowed, or ``None``."""
        layer = call.layer
        if layer is None:
            return NO_LAYER
        if isinstance(self.first, LayerKey) and isinstance(self.last, LayerKey):
            inside = self.first <= layer <= self.last
        elif isinstance(self.first, int) and isinstance(self.last, int):
            inside = self.stream in (None, layer.stream) and self.first <= layer.index <= self.last
        else:
            raise AssertionError("checked in __post_init__")
        return None if inside else f"layer {layer} is outside {self}"


@dataclass(frozen=True)
class SigmaBelow:
    """Allow steps with a noise level below a limit.

    Attributes:
        limit: In the host's units (Flux: 0 to 1), itself not allowed.
    """

    limit: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit) or self.limit <= 0:
            raise ValueError(f"limit must be a positive number, got {self.limit}")

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call's step is not allowed, or ``None``."""
        if call.step is None:
            return NO_SIGMA
        if call.step.sigma < self.limit:
            return None
        return f"sigma {call.step.sigma:.4g} is not below {self.limit:.4g}"


@dataclass(frozen=True)
class MinTokens:
    """Allow calls with enough keys; below that an approximation costs more than it saves.

    Attributes:
        tokens: Smallest number of keys allowed.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call is too small, or ``None``."""
        keys = call.k.shape[2]
        return None if keys >= self.tokens else f"{keys} keys are fewer than {self.tokens}"


class PaysOff:
    """Allow calls that the cost model predicts to be faster than exact attention.

    A prediction of times, not of fidelity, and no better than the model's rates: its reason says how far off break-even
    the call is, ``estimate(call).source`` where the rates come from.

    Args:
        work: What the backend would do in a call, ``None`` = not known: the ``work`` method of a backend.
        speed_up: Smallest predicted speed-up allowed; 1 = break-even, itself not allowed.
        model: Rates of the device; the stored model of the call's device if ``None``.

    Raises:
        ValueError: ``speed_up`` is not a positive number.
    """

    def __init__(
        self,
        work: Callable[[AttentionCall], Work | None],
        *,
        speed_up: float = 1.0,
        model: DeviceModel | None = None,
    ) -> None:
        if not math.isfinite(speed_up) or speed_up <= 0:
            raise ValueError(f"speed_up must be a positive number, got {speed_up}")
        self.work = work
        self.speed_up = speed_up
        self.model = model
        self._estimates: dict[tuple[Work, AttentionShape, torch.dtype, torch.device], Estimate] = {}

    def estimate(self, call: AttentionCall) -> Estimate | None:
        """Predict the times of the backend and of exact attention; ``None`` if the work is not known."""
        work = self.work(call)
        if work is None:
            return None
        shape = AttentionShape.of(call.q, call.k, call.v)
        key = (work, shape, call.q.dtype, call.q.device)
        known = self._estimates.get(key)
        if known is None:
            device = call.q.device if self.model is None else self.model
            known = pays_off(work, shape, dtype=call.q.dtype, device=device)
            if len(self._estimates) >= _MOST_ESTIMATES:
                self._estimates.clear()
            self._estimates[key] = known
        return known

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call does not pay off, or ``None``.

        Raises:
            ValueError: The model has no rate for the call's dtype.
        """
        found = self.estimate(call)
        if found is None:
            return "the cost of this call is not known"
        if found.speed_up > self.speed_up:
            return None
        tokens, need = call.k.shape[2], "" if self.speed_up == 1.0 else f", {self.speed_up:.3g} are asked for"
        return f"predicted {found.speed_up:.2g} times as fast as exact attention at {tokens} keys{need}"
