"""Copies from an accelerator to host memory that nobody waits for until the copy is used."""

import torch
from torch import Tensor

from ttr_distill.grad import plain


class Arrival:
    """When the copies made for one sample are complete.

    On a device without streams every copy is complete when it returns, and there is nothing to wait for.

    Args:
        events: Recorded behind the last copies.
    """

    def __init__(self, *events: "torch.cuda.Event") -> None:
        self._events = events

    def also(self, other: "Arrival | None") -> "Arrival":
        """Return when both are complete."""
        return self if other is None else Arrival(*self._events, *other._events)

    def wait(self) -> None:
        """Block this thread until the copies can be read on the host."""
        for event in self._events:
            event.synchronize()
        self._events = ()

    def before_use_on(self, device: torch.device) -> None:
        """Make sure that work queued on ``device`` from now on sees the copies; only the host path blocks."""
        if device.type != "cuda":
            self.wait()
        for event in self._events:
            torch.cuda.current_stream(device).wait_event(event)


class HostCopies:
    """Copies of one sample's tensors, kept on the device of the call or moved to pinned host memory.

    Casting happens on the source's device, before the transfer. On CUDA the transfers run on a stream of their own
    beside the model, into page-locked memory; elsewhere they are ordinary copies.

    Args:
        source: Device of the tensors.
        offload: Move to host memory.
    """

    def __init__(self, source: torch.device, *, offload: bool) -> None:
        self.device = torch.device("cpu") if offload else source
        self._stream: torch.cuda.Stream | None = None
        if offload and source.type == "cuda":
            self._stream = torch.cuda.Stream(source)  # type: ignore[no-untyped-call]

    def take(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy one tensor ``[...]``, also one made in inference mode; the copy shares no memory with it."""
        if self._stream is None or tensor.device.type != "cuda":
            return plain(tensor, dtype=dtype, device=self.device)
        cast = plain(tensor, dtype=dtype)
        host = torch.empty(cast.shape, dtype=cast.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(cast, non_blocking=True)
        # The cast copy's memory must not be handed out again while the transfer still reads it.
        cast.record_stream(self._stream)
        return host

    def arrival(self) -> Arrival:
        """Return when everything taken so far is complete."""
        if self._stream is None:
            return Arrival()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Arrival(event)
