"""The ``inspect`` command: what a run or a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def inspect(path: Annotated[Path, typer.Argument(help="Folder of a run or of a checkpoint.")]) -> None:
    """Show what a run or checkpoint holds: settings, finished phases, students and their readiness.

    A checkpoint's files are verified against their checksums.
    """
    from ttr_controller.pipeline.run_directory import RESULTS_NAME
    from ttr_controller.pipeline.showing import describe_checkpoint, describe_run

    facts, layers = describe_run(path) if (path / RESULTS_NAME).exists() else describe_checkpoint(path)
    console = Console()
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    if layers:
        grid = Table("layer", "cosine distance", "relative L2", "updates", "ready")
        for row in layers:
            grid.add_row(*row)
        console.print(grid)
