import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from ttr_distill.metrics import JsonlSink, MetricSink, MetricValue, QueuedSink, open_sinks


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


class Slow:
    """A tracker that takes rows only while it is allowed to, and remembers who wrote them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, MetricValue]] = []
        self.threads: set[str] = set()
        self.may = threading.Event()
        self.closed = False

    def write(self, row: Mapping[str, MetricValue]) -> None:
        assert self.may.wait(20)
        self.threads.add(threading.current_thread().name)
        self.rows.append(dict(row))

    def close(self) -> None:
        self.closed = True


def test_a_queue_writes_on_its_own_thread_and_is_drained_at_close() -> None:
    slow = Slow()
    queued = QueuedSink(lambda: slow, name="tracker")
    row: dict[str, MetricValue] = {"step": 0}
    for step in range(100):
        row["step"] = step
        queued.write(row)
    assert slow.rows == []
    slow.may.set()
    queued.close()
    assert [one["step"] for one in slow.rows] == list(range(100))
    assert slow.threads == {"tracker"}
    assert slow.closed
    with pytest.raises(ValueError, match="closed"):
        queued.write(row)


def test_a_full_queue_drops_the_oldest_and_never_waits(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    queued = QueuedSink(lambda: slow, name="tracker", capacity=5)
    started = time.perf_counter()
    for step in range(200):
        queued.write({"step": step})
    assert time.perf_counter() - started < 1.0
    slow.may.set()
    queued.close()
    assert [one["step"] for one in slow.rows][-5:] == list(range(195, 200))
    assert queued.dropped == 200 - len(slow.rows) >= 190
    assert f"{queued.dropped} rows were dropped" in caplog.text


def test_closing_gives_up_on_a_tracker_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    queued = QueuedSink(lambda: slow, name="tracker")
    queued.write({"step": 1})
    queued.write({"step": 2})
    started = time.perf_counter()
    queued.close(seconds=0.1)
    assert time.perf_counter() - started < 5.0
    assert "gave up" in caplog.text
    slow.may.set()


def test_a_failing_tracker_is_off_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> MetricSink:
        raise OSError("no route to host")

    queued = QueuedSink(refuse, name="tracker")
    queued.write({"step": 1})
    queued.close()
    assert queued.dropped == 1
    assert caplog.text.count("tracker is off: no route to host") == 1
    with pytest.raises(ValueError, match="at least one row"):
        QueuedSink(refuse, name="tracker", capacity=0)


def test_a_queue_that_was_never_used_opens_nothing() -> None:
    def fail() -> MetricSink:
        pytest.fail("opened")

    QueuedSink(fail, name="tracker").close()


def test_a_training_always_has_its_file_and_everything_is_closed_after_an_error(tmp_path: Path) -> None:
    slow = Slow()
    slow.may.set()
    row = {"step": 1}

    def train() -> None:
        with open_sinks(tmp_path / "m.jsonl", QueuedSink(lambda: slow, name="tracker")) as sinks:
            for sink in sinks:
                sink.write(row)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == row
    assert slow.rows == [row]
    assert slow.closed
