"""What ran, how long it took, and why the rest did not."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from attn_dispatch.call import AttentionCall, LayerKey

# One group, so that ``split`` gives words and numbers in turn.
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")

_RowKey = tuple[LayerKey | None, float | None, str]


@dataclass(frozen=True)
class DispatchRow:
    """What ran in one layer at one noise level.

    Attributes:
        layer: Which layer; ``None`` if the host does not name its layers.
        sigma: Noise level in the host's units; ``None`` if unknown.
        ran: Name of the backend, or ``"native"``.
        count: Number of calls.
        milliseconds: Sum over the calls, from the host's call to its answer, with guards and failed attempts.
    """

    layer: LayerKey | None
    sigma: float | None
    ran: str
    count: int
    milliseconds: float


class Mark(NamedTuple):
    """Moment at which a call began.

    Attributes:
        seconds: Host clock.
        event: Recorded in the device's stream; ``None`` off CUDA.
    """

    seconds: float
    event: torch.cuda.Event | None


class _Sum:
    """Calls and milliseconds of one row."""

    __slots__ = ("count", "spent")

    def __init__(self) -> None:
        self.count = 0
        self.spent = 0.0


class DispatchReport:
    """Counts attention calls by layer, noise level and backend, over all runs until ``clear``.

    Device time is taken by CUDA events that are read in ``end_run``, so no call waits for the device. Elsewhere the
    host clock is read. Memory is bounded: sigma is given up for new rows above ``max_rows`` and the sentence for new
    reasons above ``max_reasons``; counts and seconds stay complete.

    Args:
        max_rows: Rows kept apart by sigma.
        max_reasons: Decline reasons kept apart.
        max_pending: CUDA event pairs kept before the oldest is read.
    """

    def __init__(self, *, max_rows: int = 65536, max_reasons: int = 512, max_pending: int = 4096) -> None:
        if min(max_rows, max_reasons, max_pending) < 1:
            raise ValueError(
                f"limits must be at least 1, got max_rows {max_rows}, max_reasons {max_reasons}, "
                f"max_pending {max_pending}"
            )
        self.max_rows = max_rows
        self.max_reasons = max_reasons
        self.max_pending = max_pending
        self.runs = 0
        self._rows: dict[_RowKey, _Sum] = {}
        self._declines: dict[tuple[str, str], int] = {}
        self._pending: deque[tuple[_Sum, torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin_run(self) -> None:
        """Count a run; figures of earlier runs are kept."""
        self.runs += 1

    def end_run(self) -> None:
        """Read the outstanding device times; the only place that waits for the device."""
        while self._pending:
            self._read_oldest()

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.runs = 0
        self._rows.clear()
        self._declines.clear()
        self._pending.clear()

    def start(self, call: AttentionCall) -> Mark:
        """Note that a call begins."""
        if not call.q.is_cuda:
            return Mark(time.perf_counter(), None)
        return Mark(time.perf_counter(), _event(call))

    def finish(self, call: AttentionCall, ran: str, mark: Mark) -> None:
        """Note that a call was answered.

        Args:
            call: The call.
            ran: Name of the backend, or ``"native"``.
            mark: What ``start(call)`` gave.
        """
        if mark.event is None:
            self.record(call, ran, 1e3 * (time.perf_counter() - mark.seconds))
            return
        self._pending.append((self._add(call, ran, 0.0), mark.event, _event(call)))
        if len(self._pending) > self.max_pending:
            self._read_oldest()

    def record(self, call: AttentionCall, ran: str, milliseconds: float = 0.0) -> None:
        """Count one answered call of known duration."""
        self._add(call, ran, milliseconds)

    def decline(self, call: AttentionCall, backend: str, reason: str) -> None:
        """Count one reason why a backend did not answer a call."""
        key = (backend, reason)
        if key not in self._declines and len(self._declines) >= self.max_reasons:
            key = (backend, "further reasons")
        self._declines[key] = self._declines.get(key, 0) + 1

    def rows(self) -> list[DispatchRow]:
        """What ran, in order of first appearance; device times are complete after ``end_run``."""
        return [DispatchRow(*key, row.count, row.spent) for key, row in self._rows.items()]

    def declines(self) -> dict[str, int]:
        """How often each reason kept a backend from answering, most frequent first."""
        totals: dict[str, int] = {}
        for (_, reason), count in self._declines.items():
            totals[reason] = totals.get(reason, 0) + count
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def decline_kinds(self) -> dict[str, int]:
        """``declines`` with sentences that differ in their numbers alone counted as one, most frequent first.

        Numbers in which they differ stand as ``…``: twenty steps above a sigma limit are one line.
        """
        kinds: dict[tuple[str, ...], list[list[str]]] = {}
        counts: Counter[tuple[str, ...]] = Counter()
        for reason, count in self.declines().items():
            parts = _NUMBER.split(reason)
            words = tuple(parts[::2])
            counts[words] += count
            kinds.setdefault(words, []).append(parts)
        found: Counter[str] = Counter()
        for words, sentences in kinds.items():
            columns = zip(*sentences, strict=True)
            found["".join(same[0] if len(set(same)) == 1 else "…" for same in columns)] += counts[words]
        return dict(found.most_common())

    def counts(self) -> dict[str, int]:
        """How many calls each backend, or ``"native"``, answered."""
        totals: dict[str, int] = {}
        for (_, _, ran), row in self._rows.items():
            totals[ran] = totals.get(ran, 0) + row.count
        return totals

    def attention_seconds(self) -> float:
        """Seconds spent in attention; complete after ``end_run``."""
        return sum(row.spent for row in self._rows.values()) / 1e3

    def to_dict(self) -> dict[str, object]:
        """Everything counted, as values that ``json`` can write."""
        return {
            "runs": self.runs,
            "attention_seconds": self.attention_seconds(),
            "counts": self.counts(),
            "rows": [{**asdict(row), "layer": None if row.layer is None else str(row.layer)} for row in self.rows()],
            "declines": [
                {"backend": backend, "reason": reason, "count": count}
                for (backend, reason), count in self._declines.items()
            ],
        }

    def _add(self, call: AttentionCall, ran: str, milliseconds: float) -> _Sum:
        step = call.step
        key: _RowKey = (call.layer, None if step is None else step.sigma, ran)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= self.max_rows:
                key = (call.layer, None, ran)
            row = self._rows.setdefault(key, _Sum())
        row.count += 1
        row.spent += milliseconds
        return row

    def _read_oldest(self) -> None:
        row, start, stop = self._pending.popleft()
        stop.synchronize()
        row.spent += start.elapsed_time(stop)


def _event(call: AttentionCall) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(call.q.device))
    return event
