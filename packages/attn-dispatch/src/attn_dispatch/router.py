"""Who answers a call: the first route that has nothing against it, else the host's own attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attn_dispatch.call import AttentionCall, AttentionFallback, NativeAttention
from attn_dispatch.report import DispatchReport

NATIVE = "native"
"""Name under which the host's own attention stands in a report."""

OUT_OF_MEMORY = "out of memory"
"""Reason counted when a backend ran out of device memory."""


class Backend(Protocol):
    """An attention a router may choose."""

    @property
    def name(self) -> str:
        """Name in reports."""
        ...

    def refuses(self, call: AttentionCall) -> str | None:
        """Say in one sentence why this backend cannot answer the call; ``None`` if it can. Reads no tensor values."""
        ...

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, Nq, Dv]``; may raise ``AttentionFallback``."""
        ...


Guard = Callable[[AttentionCall], str | None]
"""Whether a backend may answer a call: ``None``, or one sentence why not."""


@runtime_checkable
class RunObserver(Protocol):
    """A backend or guard that wants to know when a sampling run starts and ends; it has both methods or neither."""

    def begin_run(self) -> None:
        """A sampling run starts."""
        ...

    def end_run(self) -> None:
        """The run is over, also when it failed or was interrupted."""
        ...


@runtime_checkable
class StepObserver(Protocol):
    """A backend that wants to know when a model call ends, in hosts that tell."""

    def end_step(self) -> bool:
        """One call of the network is over; True = its result must not be used, make the call again."""
        ...


@dataclass(frozen=True)
class Route:
    """A backend and what must hold before it may run.

    Attributes:
        backend: Who would answer.
        guards: Asked in this order, after the backend itself; the first reason counts and ends the asking.
    """

    backend: Backend
    guards: tuple[Guard, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "guards", tuple(self.guards))

    def refusal(self, call: AttentionCall) -> str | None:
        """Return the first reason against this route, or ``None``."""
        reason = self.backend.refuses(call)
        if reason is not None:
            return reason
        for guard in self.guards:
            reason = guard(call)
            if reason is not None:
                return reason
        return None


class AttentionRouter:
    """An ``AttentionHandler`` that tries its routes in order.

    The first route without a reason runs. If none is left, or the one that runs raises ``AttentionFallback`` or runs
    out of memory, ``native(call)`` answers, so a router whose routes all refuse is bit-equal to no router. Every
    reason is counted in the report. Any other exception passes.

    ``answered`` is the backend that answered the latest call, ``None`` if that was native attention.

    ``begin_run`` and ``end_run`` reach the report and, once each, every backend and guard that is a ``RunObserver``;
    who that is, is settled at construction.

    Args:
        routes: In order of preference; none = always native, which measures the baseline.
        report: Where to count; a new one if ``None``.
    """

    def __init__(self, routes: Sequence[Route] = (), report: DispatchReport | None = None) -> None:
        self.routes = tuple(routes)
        self.report = DispatchReport() if report is None else report
        self.answered: Backend | None = None
        self._steps = tuple(
            {id(one.backend): one.backend for one in self.routes if isinstance(one.backend, StepObserver)}.values()
        )
        observers: dict[int, RunObserver] = {}
        for route in self.routes:
            for part in (route.backend, *route.guards):
                if isinstance(part, RunObserver):
                    observers[id(part)] = part
        self._observers = tuple(observers.values())

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``call`` with ``[B, H, Nq, Dv]``.

        Raises:
            ValueError: A backend answered with another shape or dtype than native attention has.
        """
        mark = self.report.start(call)
        for route in self.routes:
            reason = route.refusal(call)
            if reason is not None:
                self.report.decline(call, route.backend.name, reason)
                continue
            try:
                output = route.backend(call)
            except AttentionFallback as fallback:
                reason = fallback.reason
            except torch.OutOfMemoryError:
                reason = OUT_OF_MEMORY
            if reason is None:
                _check_output(route.backend.name, output, call)
                self.report.finish(call, route.backend.name, mark)
                self.answered = route.backend
                return output
            # Outside the except clause: there the traceback would keep the failed attempt's tensors alive.
            self.report.decline(call, route.backend.name, reason)
            break
        self.answered = None
        output = native(call)
        self.report.finish(call, NATIVE, mark)
        return output

    def begin_run(self) -> None:
        """Tell the report and every observer that a run starts."""
        self.report.begin_run()
        for observer in self._observers:
            observer.begin_run()

    def end_step(self) -> bool:
        """Tell every ``StepObserver`` that a model call is over; True = make the call again."""
        again = False
        for observer in self._steps:
            again |= observer.end_step()
        return again

    def end_run(self) -> None:
        """Tell every observer and the report that the run is over; one that raises does not keep it from the others."""
        with ExitStack() as stack:
            stack.callback(self.report.end_run)
            for observer in reversed(self._observers):
                stack.callback(observer.end_run)


class NativeHandler(AttentionRouter):
    """A handler that always answers with native attention and measures it.

    Args:
        report: Where to count; a new one if ``None``.
    """

    def __init__(self, report: DispatchReport | None = None) -> None:
        super().__init__((), report)


def _check_output(name: str, output: Tensor, call: AttentionCall) -> None:
    expected = (*call.q.shape[:3], call.v.shape[3])
    if tuple(output.shape) != expected or output.dtype != call.q.dtype:
        raise ValueError(
            f"backend {name!r} must answer [B, H, Nq, Dv] = {expected} of {call.q.dtype}, "
            f"got {tuple(output.shape)} of {output.dtype}"
        )
