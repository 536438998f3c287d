"""Measure how far a handler's answers are from native attention, without changing them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace

import torch
from attn_kernels import cosine_distance, relative_l2
from torch import Tensor

from attn_dispatch.call import AttentionCall, AttentionHandler, LayerKey, NativeAttention

_Key = tuple[LayerKey | None, float | None]

# The four distances of a row, before anything was measured.
_NOTHING = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class FidelityRow:
    """Distance from native attention in one layer at one noise level.

    Attributes:
        layer: Which layer; ``None`` if the host does not name its layers.
        sigma: Noise level in the host's units; ``None`` if unknown.
        calls: Number of measured calls.
        exact: How many of them returned what ``native`` gave, at distance zero.
        cosine_distance: ``1 - cos`` per query and head, mean over queries, heads and calls.
        relative_l2: ``|output - native| / |native|`` over the sampled queries of a call, mean over calls.
        effective_cosine_distance: As ``cosine_distance``, from the exact attention of the scores that the backend
            means to compute; equal to it where the backend leaves the scores alone.
        effective_relative_l2: As ``relative_l2``, likewise.
    """

    layer: LayerKey | None
    sigma: float | None
    calls: int
    exact: int
    cosine_distance: float
    relative_l2: float
    effective_cosine_distance: float
    effective_relative_l2: float


class FidelityProbe:
    """An ``AttentionHandler`` that passes another handler's answers on and measures them.

    Native attention is computed for the sampled queries only, or taken over where the wrapped handler asked for the
    whole call itself. Sums stay on the device and are read in ``end_run``. Put the probe around a router, not inside
    a route: its cost is then not part of the router's report.

    A backend that changes the scores before it approximates them, e.g. by normalising queries and keys, errs twice.
    If it has ``effective(call) -> AttentionCall``, the call with the changed scores, the probe measures both on the
    same queries: the distance from unmodified attention, and from the exact attention of the changed scores. The
    backend is the one that a router names in ``answered``.

    Args:
        handler: Who answers.
        n_queries: Queries compared per call, drawn anew for each call; ``None`` = all.
        generator: Draws the queries; an own one seeded with 0 if ``None``.
        enabled: False = pass calls on and measure nothing; may be changed between calls.

    Raises:
        ValueError: ``n_queries`` is not positive.
    """

    def __init__(
        self,
        handler: AttentionHandler,
        *,
        n_queries: int | None = 64,
        generator: torch.Generator | None = None,
        enabled: bool = True,
    ) -> None:
        if n_queries is not None and n_queries < 1:
            raise ValueError(f"n_queries must be at least 1, or None for all, got {n_queries}")
        self.handler = handler
        self.n_queries = n_queries
        self.enabled = enabled
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._pending: dict[_Key, Tensor] = {}
        self._sums: dict[_Key, list[float]] = {}
        self._calls: Counter[_Key] = Counter()
        self._exact: Counter[_Key] = Counter()

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Return the wrapped handler's answer ``[B, H, Nq, Dv]`` as it is."""
        if not self.enabled:
            return self.handler(call, native)
        known: list[Tensor] = []

        def watched(asked: AttentionCall) -> Tensor:
            answer = native(asked)
            if asked is call:
                known[:] = [answer]
            return answer

        output = self.handler(call, watched)
        key = (call.layer, None if call.step is None else call.step.sigma)
        self._calls[key] += 1
        if known and output is known[0]:
            self._exact[key] += 1
            return output
        with torch.no_grad():
            distances = self._measure(output, known[0] if known else None, call, native)
            before = self._pending.get(key)
            self._pending[key] = distances if before is None else before + distances.to(before.device)
        return output

    def begin_run(self) -> None:
        """Tell the wrapped handler; figures of earlier runs are kept."""
        self.handler.begin_run()

    def end_run(self) -> None:
        """Read the distances from the device and tell the wrapped handler."""
        try:
            self.handler.end_run()
        finally:
            for key, total in self._pending.items():
                before = self._sums.get(key, _NOTHING)
                self._sums[key] = [old + new for old, new in zip(before, total.tolist(), strict=True)]
            self._pending.clear()

    def clear(self) -> None:
        """Forget everything measured so far."""
        for figures in (self._pending, self._sums, self._calls, self._exact):
            figures.clear()

    def rows(self) -> list[FidelityRow]:
        """Distances by layer and noise level, in order of first appearance; complete after ``end_run``."""
        rows = []
        for key, calls in self._calls.items():
            means = [total / calls for total in self._sums.get(key, _NOTHING)]
            rows.append(FidelityRow(*key, calls, self._exact[key], *means))
        return rows

    def to_dict(self) -> dict[str, object]:
        """The rows, as values that ``json`` can write."""
        return {
            "n_queries": self.n_queries,
            "rows": [{**asdict(row), "layer": None if row.layer is None else str(row.layer)} for row in self.rows()],
        }

    def end_step(self) -> bool:
        """Pass on that a model call is over; True = make the call again."""
        end_step = getattr(self.handler, "end_step", None)
        return end_step is not None and bool(end_step())

    def _measure(self, output: Tensor, target: Tensor | None, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Return the four distances of a row for this call, on the device and in float32."""
        queries = call.q.shape[2]
        index: Tensor | None = None
        if self.n_queries is not None and self.n_queries < queries:
            drawn = torch.randperm(queries, generator=self._generator, device=self._generator.device)
            index = drawn[: self.n_queries].to(output.device, non_blocking=True)
            output = output.index_select(2, index)
        exact = native(_of_queries(call, index)) if target is None else target
        if target is not None and index is not None:
            exact = target.index_select(2, index)
        raw = [cosine_distance(output, exact).mean(), relative_l2(output, exact)]
        effective = getattr(getattr(self.handler, "answered", None), "effective", None)
        meant = call if effective is None else effective(call)
        if meant is not call:
            exact = native(_of_queries(meant, index))
            raw += [cosine_distance(output, exact).mean(), relative_l2(output, exact)]
        return torch.stack((raw * 2)[:4]).float()


def _of_queries(call: AttentionCall, index: Tensor | None) -> AttentionCall:
    """The call with these queries ``[n]`` only, ``None`` = all."""
    if index is None:
        return call
    bias = call.attn_bias
    if bias is not None and bias.ndim >= 2 and bias.shape[-2] > 1:
        bias = bias.index_select(bias.ndim - 2, index)
    return replace(call, q=call.q.index_select(2, index), attn_bias=bias)
