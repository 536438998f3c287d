"""Progress bars of the phases, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ttr_controller.pipeline.quickstart import PhaseProgress


class RichProgress:
    """Shows each phase as one bar.

    Args:
        progress: The running display.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, title: str, work: float) -> int:
        """Add a bar for a phase of ``work`` units; returns its number."""
        return self._progress.add_task(title, total=work)

    def advance(self, phase: int, work: float) -> None:
        """Move a phase's bar."""
        self._progress.advance(TaskID(phase), work)

    def finish(self, phase: int) -> None:
        """Fill a phase's bar."""
        task = next(task for task in self._progress.tasks if task.id == phase)
        self._progress.update(task.id, completed=task.total)


@contextmanager
def phase_progress(console: Console) -> Iterator[PhaseProgress]:
    """Show progress bars while phases run."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield RichProgress(progress)
