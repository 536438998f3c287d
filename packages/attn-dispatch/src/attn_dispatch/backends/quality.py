"""How far an approximate backend is from exact attention, on a few queries, without waiting for the device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attn_dispatch.call import AttentionCall
from attn_dispatch.masks import join_mask


@dataclass(frozen=True)
class Quality:
    """Distance from exact attention, over sampled queries.

    Attributes:
        mean_abs: Mean of ``|output - exact|`` over elements.
        max_abs: Its largest value.
        mean_rel: Mean of ``|output - exact| / (|exact| + 1e-6)``; elements near zero dominate it.
        max_rel: Its largest value.
        relative_l2: ``|output - exact| / |exact|``.
        samples: Number of elements compared.
        calls: Number of calls compared.
    """

    mean_abs: float
    max_abs: float
    mean_rel: float
    max_rel: float
    relative_l2: float
    samples: int
    calls: int

    def to_dict(self) -> dict[str, float | int]:
        """The figures, as values that ``json`` can write."""
        return asdict(self)


class QualityTally:
    """Adds up distances on the device; ``values`` and ``figures`` split the reading, so that it can wait."""

    size = 6
    """Elements of ``values``."""

    def __init__(self) -> None:
        self.samples = 0
        self.calls = 0
        self._values: Tensor | None = None

    def add(self, output: Tensor, exact: Tensor) -> None:
        """Compare one call.

        Args:
            output: ``[B, H, n, Dv]``, the approximate answers of the sampled queries.
            exact: ``[B, H, n, Dv]``.
        """
        target = exact.float()
        error = (output.float() - target).abs()
        relative = error / (target.abs() + 1e-6)
        sums = [error.sum(), relative.sum(), error.square().sum(), target.square().sum()]
        new = torch.stack([*sums, error.amax(), relative.amax()])
        if self._values is not None:
            old = self._values.to(new.device)
            new = torch.cat([old[:4] + new[:4], torch.maximum(old[4:], new[4:])])
        self._values = new
        self.samples += output.numel()
        self.calls += 1

    def values(self) -> Tensor:
        """The sums so far, ``[6]`` float32 on the device."""
        return torch.zeros(self.size) if self._values is None else self._values

    def figures(self, values: list[float]) -> Quality | None:
        """Make the figures from ``values()`` as read; ``None`` if nothing was compared."""
        if not self.calls:
            return None
        absolute, relative, error, target, max_abs, max_rel = values
        return Quality(
            mean_abs=absolute / self.samples,
            max_abs=max_abs,
            mean_rel=relative / self.samples,
            max_rel=max_rel,
            relative_l2=(error / target) ** 0.5 if target > 0 else float(error > 0),
            samples=self.samples,
            calls=self.calls,
        )


class PendingValues:
    """Numbers on their way from the device.

    Args:
        values: ``[n]`` on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))

    def ready(self) -> bool:
        """Whether ``read`` would not wait; always True where the host cannot ask."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> list[float]:
        """Return the numbers, waiting for them where they are not ready."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]


def sample_queries(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw distinct places, one at random from each of equal stretches.

    Args:
        count: How many; all of them if that is no fewer than there are.
        total: Number of places.
        generator: Draws; of the CPU.

    Returns:
        ``[min(count, total)]`` int64 on the CPU, increasing.
    """
    if count >= total:
        return torch.arange(total)
    start = torch.arange(count) * total // count
    stop = (torch.arange(count) + 1) * total // count
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return start + (drawn * (stop - start)).long().clamp(max=(stop - start) - 1)


def exact_rows(call: AttentionCall, index: Tensor) -> Tensor:
    """Answer some queries of a call exactly.

    Args:
        call: q ``[B, H, Nq, D]``, k ``[B, H, Nk, D]``, v ``[B, H, Nk, Dv]``.
        index: ``[n]`` int64 on the device of q.

    Returns:
        ``[B, H, n, Dv]`` in the dtype of v.
    """
    bias = call.attn_bias
    if bias is not None and bias.ndim >= 2 and bias.shape[-2] > 1:
        bias = bias.index_select(bias.ndim - 2, index)
    return functional.scaled_dot_product_attention(
        call.q.index_select(2, index),
        call.k,
        call.v,
        attn_mask=join_mask(call.key_mask, bias, call.q.dtype),
        scale=call.scale,
    )
