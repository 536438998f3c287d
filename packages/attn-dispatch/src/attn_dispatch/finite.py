"""A numerical guard: what is not finite is replaced by the exact result, and its layer is taken out for the run.

Asking a device whether a tensor is finite means waiting for it, once per call and layer, and exact attention cannot be
computed "in case" without paying for it. So the answer depends on where the tensors are:

*On a CPU* there is nothing to wait for. The output is checked before it is handed on; if it is not finite the backend
falls back, the router answers with exact attention, and the reason is counted.

*On a device, in a host that ends its steps* (``end_step``, as the ComfyUI adapter does after every call of the
network): each call leaves one flag on the device, and all flags of the step are read together, which is one wait per
step and none per call. If one is set, ``end_step`` answers True: the host throws the result of the step away and makes
it again, now without the layer. Nothing non-finite leaves the step.

*On a device, in a host that does not end its steps*: the flags of a step are copied to the host in the background when
the next step begins, and looked at once they have arrived. The layer is out from then on, and the output that was
already handed on stays as it is. This is all that can be had without waiting; the run's report names it.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from attn_dispatch.call import AttentionCall, AttentionFallback, LayerKey, StepContext
from attn_dispatch.router import Backend, RunObserver

logger = logging.getLogger(__name__)


class _Flagged(NamedTuple):
    """Layers of one step in order of their calls, and whether the output of each was finite."""

    layers: tuple[LayerKey | None, ...]
    finite: Tensor
    arrived: torch.cuda.Event | None


class FiniteBackend:
    """A ``Backend`` that watches another one for outputs that are not finite.

    Where a layer gave one, ``refuses`` says so for the rest of the run, and one line is logged for the run. Of the
    layers of a step the first in order of calls is to blame: those behind it saw its values. If the step made again is
    not finite either, all layers that took part are taken out, so a step is made at most three times. A host that does
    not name its layers loses the backend as a whole.

    Inputs that are not finite already are the host's; no layer is taken out for them on a CPU.

    Args:
        backend: Who answers; keeps its name.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.out: dict[LayerKey | None, str] = {}
        self._step: StepContext | None = None
        self._pending: list[tuple[LayerKey | None, Tensor]] = []
        self._travelling: deque[_Flagged] = deque()
        self._repeats = 0

    @property
    def name(self) -> str:
        """Name of the watched backend."""
        return self.backend.name

    def refuses(self, call: AttentionCall) -> str | None:
        """Say why the backend cannot answer, or why it must not any more in this run."""
        reason = self.out.get(call.layer)
        return self.backend.refuses(call) if reason is None else reason

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, Nq, Dv]``.

        Raises:
            AttentionFallback: On a CPU, the output is not finite; or the watched backend falls back.
        """
        output = self.backend(call)
        if self._is_ready(output):
            if not _is_finite(output):
                if all(_is_finite(x) for x in (call.q, call.k, call.v)):
                    self._take_out(call.layer, call.step)
                raise AttentionFallback("the output is not finite")
            return output
        if call.step != self._step:
            self._send()
            self._step = call.step
        self._pending.append((call.layer, _finite_flag(output)))
        self._receive()
        return output

    def effective(self, call: AttentionCall) -> AttentionCall:
        """The call whose exact attention the watched backend approximates."""
        changed = getattr(self.backend, "effective", None)
        return call if changed is None else changed(call)

    def begin_run(self) -> None:
        """Forget what was taken out in earlier runs, and tell the watched backend."""
        self.out.clear()
        self._forget()
        if isinstance(self.backend, RunObserver):
            self.backend.begin_run()

    def end_run(self) -> None:
        """Look at the flags that are left, and tell the watched backend."""
        try:
            self._send()
            while self._travelling:
                self._judge(self._travelling.popleft())
        finally:
            self._forget()
            if isinstance(self.backend, RunObserver):
                self.backend.end_run()

    def end_step(self) -> bool:
        """Look at the flags of the step; True = its result must be made again. Waits for the device once."""
        if not self._pending:
            self._repeats = 0
            return False
        flagged = _Flagged(tuple(layer for layer, _ in self._pending), _stack(self._pending), None)
        self._pending.clear()
        if not self._judge(flagged, all_of_them=self._repeats > 0):
            self._repeats = 0
            return False
        self._repeats += 1
        return True

    def _is_ready(self, output: Tensor) -> bool:
        """Whether looking at the output waits for nobody."""
        return output.device.type == "cpu"

    def _send(self) -> None:
        """Copy the flags of the last step to the host in the background."""
        if not self._pending:
            return
        layers = tuple(layer for layer, _ in self._pending)
        flags = _stack(self._pending)
        self._pending.clear()
        if flags.device.type != "cuda":
            self._travelling.append(_Flagged(layers, flags, None))
            return
        landed = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        landed.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(flags.device))
        self._travelling.append(_Flagged(layers, landed, event))

    def _receive(self) -> None:
        """Look at the flags that have arrived; never waits."""
        while self._travelling:
            event = self._travelling[0].arrived
            if event is None or not event.query():  # type: ignore[no-untyped-call]
                return
            self._judge(self._travelling.popleft())

    def _judge(self, flagged: _Flagged, *, all_of_them: bool = False) -> bool:
        """Take out the first layer that was not finite, or all that took part; False = all were finite."""
        if flagged.arrived is not None:
            flagged.arrived.synchronize()
        bad = [layer for layer, finite in zip(flagged.layers, flagged.finite.tolist(), strict=True) if not finite]
        for layer in dict.fromkeys(flagged.layers if bad and all_of_them else bad[:1]):
            self._take_out(layer, self._step)
        return bool(bad)

    def _take_out(self, layer: LayerKey | None, step: StepContext | None) -> None:
        where = "an unnamed layer" if layer is None else f"layer {layer}"
        if not self.out:
            sigma = "" if step is None else f" at sigma {step.sigma:.4g}"
            logger.warning(
                "%s: %s gave values that are not finite%s; exact attention there for the rest of the run",
                self.name,
                where,
                sigma,
            )
        self.out[layer] = f"{where} gave values that are not finite"

    def _forget(self) -> None:
        self._pending.clear()
        self._travelling.clear()
        self._step = None
        self._repeats = 0


def _finite_flag(x: Tensor) -> Tensor:
    """Whether all values are finite: a bool tensor of one element. A sum carries every NaN and infinity."""
    return torch.isfinite(x.sum(dtype=torch.float64 if x.dtype is torch.float64 else torch.float32))


def _is_finite(x: Tensor) -> bool:
    """The same, read at once; for tensors that no device computes."""
    return bool(torch.isfinite(x).all())


def _stack(flags: list[tuple[LayerKey | None, Tensor]]) -> Tensor:
    return torch.stack([flag for _, flag in flags])
