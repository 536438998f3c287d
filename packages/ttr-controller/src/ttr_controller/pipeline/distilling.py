"""Phase 1 of a run: distil the students online while the teacher samples; resumable after every image."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from ttr_distill.metrics import MetricSink, open_sinks
from ttr_distill.saved_students import load_students, save_students
from ttr_distill.student import ReadinessTracker
from ttr_distill.training import DistillConfig, Distiller

from ttr_controller.pipeline.workbench import Students, Tick, Workbench

CURVE_NAME = "distillation.jsonl"
REPLAY_BYTES = 64 * 2**20
"""The replay is saved after every image; more would cost more time to write than to learn from."""


def distill(bench: Workbench, tick: Tick) -> None:
    """Sample training prompts with the teacher and let every layer's student learn from what it sees.

    Students, optimizer and replay are saved after every image, so that an interrupted run goes on there. At the end
    each student keeps the better of its training-free and its learned form; records the section ``distillation``.
    """
    start = time.perf_counter()
    prompts, seeds = bench.train_set(bench.plan().distill_images)
    with open_sinks(bench.run.path / CURVE_NAME, *bench.trackers) as sinks:
        students, distiller = _start(bench, sinks)
        for prompt, seed in list(zip(prompts, seeds, strict=True))[distiller.runs :]:
            bench.sampler.sample([prompt], [seed], distiller)
            distiller.raise_pending()
            _save(bench, students, distiller)
            tick(2.0)
    kept = distiller.finish()
    _save(bench, students, distiller, include_replay=False)
    section = {
        "images": distiller.runs,
        "updates": distiller.updates,
        "kept_learned": {str(layer): learned for layer, learned in kept.items()},
        "curves": _curves(bench, distiller.runs),
    }
    bench.run.record("distillation", section, time.perf_counter() - start)


def load_trained(bench: Workbench) -> Students:
    """Load the students that Phase 1 left in the run.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another teacher.
    """
    loaded = load_students(bench.run.students, fingerprint=bench.teacher.fingerprint, device=bench.run.settings.device)
    return Students(loaded.bank, loaded.readiness)


def _start(bench: Workbench, sinks: Sequence[MetricSink]) -> tuple[Students, Distiller]:
    """Go on with the run's training, or begin it."""
    seed = bench.run.settings.seed
    # Every layer learns in every step: a run has few images, and readiness asks for enough measurements of each layer.
    config = DistillConfig(min_swap_layers=len(bench.sampler.layers), replay_bytes=REPLAY_BYTES)
    if not bench.run.students.exists():
        students = Students(bench.new_bank(), ReadinessTracker())
        return students, Distiller(students.bank, students.readiness, config, seed=seed, sinks=sinks)
    loaded = load_students(
        bench.run.students,
        fingerprint=bench.teacher.fingerprint,
        device=bench.run.settings.device,
        training=True,
    )
    students = Students(loaded.bank, loaded.readiness)
    distiller = Distiller(students.bank, students.readiness, config, seed=seed, sinks=sinks)
    if loaded.training is not None:
        distiller.load_state_dict(loaded.training)
    return students, distiller


def _save(bench: Workbench, students: Students, distiller: Distiller, *, include_replay: bool = True) -> None:
    save_students(
        bench.run.students,
        students.bank,
        students.readiness,
        distiller,
        fingerprint=bench.teacher.fingerprint,
        include_replay=include_replay,
    )


def _curves(bench: Workbench, runs: int) -> list[dict[str, object]]:
    """Learning curve of each layer from the metrics file; a run written twice, around an interruption, counts once."""
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for line in (bench.run.path / CURVE_NAME).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["run"] <= runs:
            rows[(row["layer"], row["run"])] = row
    curves: list[dict[str, object]] = []
    for layer in map(str, bench.sampler.layers):
        own = [row for (name, _), row in sorted(rows.items()) if name == layer]
        curves.append(
            {
                "layer": layer,
                "update": [row["updates"] for row in own],
                "loss": [row["loss"] for row in own],
                "cosine_distance": [row["heldout_cosine"] for row in own],
            }
        )
    return curves
