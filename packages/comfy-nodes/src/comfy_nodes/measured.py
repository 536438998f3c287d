"""What the latest sampling run of a model did, kept by the handler that answered it."""

import time
from dataclasses import dataclass

from attn_dispatch.call import AttentionCall, NativeAttention
from attn_dispatch.masks import join_mask
from attn_dispatch.probe import FidelityProbe, FidelityRow
from attn_dispatch.report import DispatchReport
from attn_dispatch.router import AttentionRouter
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PROBED_QUERIES = 64
"""Queries of a call that are compared with exact attention where errors are measured."""


@dataclass(frozen=True)
class RunFigures:
    """What is known of the latest run.

    Attributes:
        report: What ran and why the rest did not.
        errors: Distances from exact attention by layer and noise level; empty if not measured.
        seconds: Length of the run; ``None`` = none has ended.
    """

    report: DispatchReport
    errors: tuple[FidelityRow, ...] = ()
    seconds: float | None = None


class Measured:
    """An ``AttentionHandler`` around a router whose figures are those of the latest run.

    Args:
        router: Who answers.
        probe_queries: Queries of each call that are compared with exact attention; 0 = none.
    """

    def __init__(self, router: AttentionRouter, probe_queries: int = 0) -> None:
        self.router = router
        self.probe = FidelityProbe(router, n_queries=probe_queries) if probe_queries else None
        self.seconds: float | None = None
        self._started = 0.0

    @property
    def report(self) -> DispatchReport:
        """What ran in the latest run."""
        return self.router.report

    def figures(self) -> RunFigures:
        """Everything known of the latest run."""
        return RunFigures(self.report, () if self.probe is None else tuple(self.probe.rows()), self.seconds)

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``call`` with ``[B, H, Nq, Dv]``."""
        if self.probe is None:
            return self.router(call, native)

        def exact(asked: AttentionCall) -> Tensor:
            # What is native here may be another approximation, whose report must not count the comparison either.
            return native(asked) if asked is call else _attend(asked)

        return self.probe(call, exact)

    def begin_run(self) -> None:
        """Forget the last run and tell the router."""
        self.report.clear()
        if self.probe is not None:
            self.probe.clear()
        self.seconds = None
        self._started = time.perf_counter()
        (self.probe or self.router).begin_run()

    def end_step(self) -> bool:
        """Pass on that a model call is over; True = make the call again."""
        return self.router.end_step()

    def end_run(self) -> None:
        """Tell the router, and read what was measured."""
        try:
            (self.probe or self.router).end_run()
        finally:
            self.seconds = time.perf_counter() - self._started


def _attend(call: AttentionCall) -> Tensor:
    mask = join_mask(call.key_mask, call.attn_bias, call.q.dtype)
    return scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)


def figures_of(handler: object) -> RunFigures | None:
    """Return what a handler knows of its latest run; ``None`` if it keeps no report."""
    if isinstance(handler, Measured):
        return handler.figures()
    report = getattr(handler, "report", None)
    return RunFigures(report) if isinstance(report, DispatchReport) else None
