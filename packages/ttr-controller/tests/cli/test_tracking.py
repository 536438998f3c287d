"""Trackers that the command line asks for."""

import json
import sys

import pytest
from ttr_controller.cli import main, tracking
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import QuickstartSettings
from ttr_distill.comet_metrics import ControllerMetricNames, DistillMetricNames
from ttr_distill.metrics import QueuedSink

SMALL = ("--height", "32", "--width", "32", "--steps", "2", "--queries", "16", "--images", "1")


def run_ttr(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.mark.parametrize(("option", "package"), [("comet", "comet_ml"), ("trackio", "trackio")])
@pytest.mark.parametrize("command", ["distill", "train-controller"])
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, capsys, command, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    run = RunDirectory.open_or_create(tmp_path / "run", QuickstartSettings(rows=8, columns=8, steps=2))
    words = ("--out", tmp_path / "out", *SMALL) if command == "distill" else (run.path,)
    assert run_ttr(command, *words, f"--{option}") == 1
    said = capsys.readouterr().err.strip()
    assert said == f"ttr: --{option} needs the package {package}; install ttr-distill[{option}]"
    assert not (tmp_path / "out").exists()


def test_trackers_are_made_as_asked_and_connect_to_nothing_before_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda package: package)
    names = []

    def make_names():
        names.append(ControllerMetricNames())
        return names[-1]

    assert tracking.open_trackers(make_names, tmp_path, {}, comet=False, trackio=False) == ()
    made = tracking.open_trackers(make_names, tmp_path, {"a": 1}, comet=True, trackio=True)
    assert [sink.name for sink in made] == ["Comet", "Trackio"]
    assert len(names) == 2, "each keeps its own cadence"
    for sink in made:
        sink.close()
    assert list(tmp_path.iterdir()) == []


class Rows:
    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, row):
        self.rows.append(dict(row))

    def close(self):
        self.closed = True


def test_a_session_sends_its_rows_beside_the_file(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    rows, asked = Rows(), []

    def trackers(make_names, folder, parameters, *, comet, trackio):
        asked.append((type(make_names()), folder, parameters["student"], comet, trackio))
        return (QueuedSink(lambda: rows, name="rows"),)

    monkeypatch.setattr("ttr_controller.cli.distilling.open_trackers", trackers)
    out = tmp_path / "out"
    assert run_ttr("distill", "--out", out, *SMALL, "--set", "tile=2", "--set", "top_k=1", "--trackio") == 0
    written = [json.loads(line) for line in (out / "distill.jsonl").read_text().splitlines()]
    assert len(written) == 6
    assert [row["layer"] for row in rows.rows] == [row["layer"] for row in written]
    assert {"sigma", "cfg_scale", "log_var_huber", "mse", "layers_swapped", "layers_total"} <= set(written[0])
    assert rows.closed
    assert asked == [(DistillMetricNames, out, "near_far", False, True)]
