"""Describe a run or a student checkpoint in words."""

from __future__ import annotations

from pathlib import Path

from ttr_distill.saved_students import SavedStudents, load_students

from ttr_controller.pipeline.quickstart import PHASES
from ttr_controller.pipeline.run_directory import RunDirectory

Facts = dict[str, str]
LayerRows = list[tuple[str, str, str, str, str]]
"""Layer, cosine distance, relative L2, updates, level."""


def describe_run(folder: Path) -> tuple[Facts, LayerRows]:
    """Settings, finished phases and students of a run.

    Raises:
        RunError: The results are damaged.
        CheckpointError: The students are damaged.
    """
    run = RunDirectory.open(folder)
    settings = run.settings
    facts = {
        "run": str(folder),
        "preset": settings.preset,
        "size": f"{settings.rows} x {settings.columns} tokens, {settings.steps} steps, guidance {settings.guidance:g}",
        "seed": str(settings.seed),
        "phases done": ", ".join(name for name in PHASES if run.has(name)) or "none",
        "state": "complete" if run.complete else f"unfinished; go on with: ttr quickstart --out {folder}",
    }
    if not run.students.exists():
        return facts, []
    return facts, layer_rows(load_students(run.students, fingerprint=None))


def describe_checkpoint(folder: Path) -> tuple[Facts, LayerRows]:
    """Facts of a student checkpoint.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    saved = load_students(folder, fingerprint=None)
    config = ", ".join(f"{name} {value}" for name, value in saved.bank.config.to_dict().items() if name != "preset")
    facts = {
        "checkpoint": str(folder),
        "preset": saved.bank.config.preset,
        "settings": config,
        "layers": f"{len(saved.bank)} of {saved.bank.heads} heads of width {saved.bank.width}",
    }
    return facts, layer_rows(saved)


def layer_rows(saved: SavedStudents) -> LayerRows:
    """One row of held-out figures per layer."""
    rows: LayerRows = []
    for layer in saved.bank.layers:
        state = saved.readiness[layer]
        cosine = "not measured" if state.ema_cosine is None else f"{state.ema_cosine:.5f}"
        relative = "not measured" if state.ema_relative_l2 is None else f"{state.ema_relative_l2:.4f}"
        rows.append((str(layer), cosine, relative, str(state.updates), state.level))
    return rows
