"""Where training writes its numbers."""

import json
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

SINK_ERRORS = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError)
"""What a tracker may fail with; other errors are bugs of this package.

The trackers' own kinds of error are turned into these where the trackers are called.
"""

MetricValue = str | int | float | bool | None


class MetricSink(Protocol):
    """Takes rows of metrics; a file, a tracker, a list in a test."""

    def write(self, row: Mapping[str, MetricValue]) -> None:
        """Take one row."""
        ...


class JsonlSink:
    """Appends one JSON object a row to a file and flushes it, so that a killed run loses nothing written before.

    Args:
        path: The file; made with its parent folders if missing, appended to otherwise.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A run killed in the middle of a line must not swallow the first line of the next one.
        torn = self.path.exists() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, row: Mapping[str, MetricValue]) -> None:
        """Append the row; a number that is not finite becomes ``null``, which every JSON reader understands."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self._file.write(json.dumps(clean, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further rows raise ``ValueError``."""
        self._file.close()


class QueuedSink:
    """Hands rows to another sink on a thread of its own, so that writing never waits for a network.

    The other sink is made on that thread too, at the first row. If making it or a row fails, one warning is logged and
    further rows are dropped: a tracker never ends a training.

    Args:
        open_sink: Makes the other sink; its ``close``, if it has one, is called on the thread as well.
        name: Whose thread it is, for the log.
        capacity: Rows that may wait; when there are more, the oldest is dropped and counted.

    Attributes:
        dropped: Rows that never arrived.
    """

    def __init__(self, open_sink: Callable[[], MetricSink], *, name: str, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise ValueError(f"a queue holds at least one row, got capacity {capacity}")
        self.name = name
        self.dropped = 0
        self._open_sink = open_sink
        self._capacity = capacity
        self._rows: deque[dict[str, MetricValue]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failed = False
        self._thread: threading.Thread | None = None

    def write(self, row: Mapping[str, MetricValue]) -> None:
        """Take one row; returns at once.

        Raises:
            ValueError: The sink is closed.
        """
        with self._changed:
            if self._closing:
                raise ValueError(f"the {self.name} sink is closed")
            if self._failed:
                self.dropped += 1
                return
            if len(self._rows) >= self._capacity:
                self._rows.popleft()
                self.dropped += 1
            self._rows.append(dict(row))
            self._changed.notify()
            if self._thread is None:
                # A daemon: a tracker that hangs must not keep the process alive.
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()

    def close(self, *, seconds: float = 30.0) -> None:
        """Wait until all rows are written and the other sink is closed.

        Args:
            seconds: Longest wait; what is left then is dropped with a warning.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                self.dropped += len(self._rows)
                logger.warning("%s: gave up after %.0f s, %d rows are not written", self.name, seconds, self.dropped)
        if self.dropped and not self._failed:
            logger.warning("%s: %d rows were dropped", self.name, self.dropped)

    def _next(self) -> dict[str, MetricValue] | None:
        with self._changed:
            while not self._rows and not self._closing:
                self._changed.wait()
            return self._rows.popleft() if self._rows else None

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (row := self._next()) is not None:
                sink.write(row)
            close = getattr(sink, "close", None)
            if close is not None:
                close()
        except SINK_ERRORS as error:
            with self._changed:
                self._failed = True
                self.dropped += len(self._rows)
                self._rows.clear()
            logger.warning("%s is off: %s", self.name, error)


@contextmanager
def open_sinks(path: Path | str, *trackers: QueuedSink) -> Iterator[tuple[MetricSink, ...]]:
    """Open the sinks of a training: always a JSONL file, and any trackers; all are closed at the end, whatever happens.

    Args:
        path: The JSONL file.
        *trackers: From ``comet_sink`` or ``trackio_sink``.

    Yields:
        The sinks, for a distiller or a controller's trainer.
    """
    with ExitStack() as stack:
        lines = JsonlSink(path)
        stack.callback(lines.close)
        for tracker in trackers:
            stack.callback(tracker.close)
        yield (lines, *trackers)
