from __future__ import annotations

import os
from pathlib import Path

import pytest
from ttr_distill.tiny.store import RunStore, replace_file


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


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
