import json
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from ttr_distill.comet_metrics import ControllerMetricNames
from ttr_distill.trackio import TrackioConfig, trackio_sink


@pytest.mark.enable_socket
def test_metrics_are_in_the_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    sink = trackio_sink(ControllerMetricNames(every=2, total=4), TrackioConfig(name="one", parameters={"a": {"b": 3}}))
    started = time.perf_counter()
    for step in range(1, 5):
        sink.write({"step": step, "reward": step / 4})
    assert time.perf_counter() - started < 0.1, "the sampling thread waited for Trackio"
    sink.close()
    assert sink.dropped == 0
    (file,) = Path(trackio.utils.TRACKIO_DIR).glob("*.db")
    with sqlite3.connect(file) as store:
        rows = dict(store.execute("select step, metrics from metrics"))
        configs = str(store.execute("select config from configs").fetchall())
    assert sorted(rows) == [1, 2, 4]
    assert json.loads(rows[2])["flux2ttr_controller/reward"] == 0.5
    assert "a.b" in configs


def test_without_the_package_one_warning_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    sink = trackio_sink(ControllerMetricNames())
    sink.write({"step": 1})
    sink.close()
    assert caplog.text.count("install ttr-distill[trackio]") == 1
