"""Where training writes its numbers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

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
