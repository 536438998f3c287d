import json
import math
from pathlib import Path

import pytest
from ttr_distill.metrics import JsonlSink, MetricSink


def test_rows_are_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink: MetricSink = JsonlSink(path)
    sink.write({"layer": "single:0", "loss": 0.25, "ready": True, "ema": None})
    assert json.loads(path.read_text()) == {"layer": "single:0", "loss": 0.25, "ready": True, "ema": None}
    sink.write({"loss": 0.5})
    assert len(path.read_text().splitlines()) == 2


def test_a_second_sink_appends(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for value in (1, 2):
        sink = JsonlSink(path)
        sink.write({"run": value})
        sink.close()
    assert [json.loads(line)["run"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_torn_line_does_not_swallow_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"run": 1}\n{"ru')
    JsonlSink(path).write({"run": 2})
    assert json.loads(path.read_text().splitlines()[-1]) == {"run": 2}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JsonlSink(path).write({"a": math.nan, "b": math.inf, "c": 1.0})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": None, "c": 1.0}


def test_a_closed_sink_says_so(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write({"run": 1})
