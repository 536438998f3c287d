from __future__ import annotations

from pathlib import Path

from ttr_distill.tiny.store import RunStore


def test_curve_averages_stretches(tmp_path: Path) -> None:
    store = RunStore(tmp_path, "run")
    for step in range(300):
        row = {"step": step, "loss": float(step), "cpu_seconds": step / 2}
        store.log(row | {"validation_loss": 7.0} if step == 150 else row)
    curve = store.curve()
    training, validation = curve["training_loss"], curve["validation_loss"]
    assert isinstance(training, list)
    assert len(training) == 100
    assert training[0] == {"step": 2, "cpu_seconds": 1.0, "loss": 1.0}
    assert validation == [{"step": 150, "loss": 7.0}]
