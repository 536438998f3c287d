"""Phase 2 of a small run on the real embedded teacher, by every method."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from ttr_controller.methods import METHODS
from ttr_controller.pipeline import routing
from ttr_controller.pipeline.distilling import load_trained
from ttr_controller.pipeline.quickstart import run_controller, run_phases
from ttr_controller.pipeline.routing import Learning, load_routing
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.serving import draw
from ttr_controller.pipeline.settings import QuickstartSettings, RunError
from ttr_controller.pipeline.workbench import Workbench
from ttr_controller.report import plots
from ttr_controller.report.results import load_results
from ttr_distill.distributed import joined
from ttr_distill.metrics import QueuedSink
from ttr_distill.saved_students import load_students, save_students

SMALL = QuickstartSettings(budget_minutes=0.1, rows=8, columns=8, steps=2, timing_sides=(8,))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = RunDirectory.open_or_create(tmp_path_factory.mktemp("routing") / "run", SMALL)
    run_phases(made, ("distillation",))
    return made


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_controller_that_serves(run, method):
    run_controller(run, method, rollouts=8)
    section = run.section("controller")
    assert section["learner"] == method
    assert section["start"]["chosen"].startswith("knapsack of distillation error and ") == (method == "budget")
    assert section["rollouts"] == (8 if method in routing.LEARNING else 0)
    learned = load_routing(Workbench.open(run))
    slots = learned.scores.numel()
    for count in (0, slots // 3, slots):
        assert int(learned.mask(count).sum()) == count
    assert len(section["heatmap"]["full_probability"]) == SMALL.steps
    shown = {"layer error", "budget", "probe"} | ({"flips"} if method == "relaxed" else {method})
    assert set(learned.rankings) == shown - {"reinforce"}
    curve = section["curve"]
    assert len(curve) == 2 + {"relaxed": 1, "reinforce": 2}.get(method, 0)
    assert [point["rollouts"] for point in curve] == sorted(point["rollouts"] for point in curve)
    assert curve[0]["rollouts"] == 0
    assert all(point["quality"] > 0 for point in curve[2:]), "the loss of every update"
    assert 0 < curve[-1]["validation"] <= curve[1]["validation"], "the best is kept"
    assert plots.learning_plot(load_results(run.path).controller, [("validation_error", "x")], "y") is not None


def test_another_method_learns_anew_and_the_same_one_does_not(run, monkeypatch):
    run_controller(run, "probe")
    done = []
    real = routing.learn_routing

    def counted(*arguments):
        done.append(arguments[-1].method)
        real(*arguments)

    monkeypatch.setattr(routing, "learn_routing", counted)
    run_controller(run, "probe")
    assert done == []
    run.record("pareto", {"points": []})
    run_controller(run, "budget")
    assert done == ["budget"]
    assert not run.has("pareto")


class Stopped(Exception):
    pass


def test_a_broken_off_training_ends_like_an_unbroken_one(run, tmp_path):
    copy = RunDirectory.open(shutil.copytree(run.path, tmp_path / "copy"))
    for one in (run, copy):
        one.forget("controller")
        shutil.rmtree(one.controller, ignore_errors=True)
    run_controller(run, "relaxed", rollouts=16)
    bench = Workbench.open(copy)
    ticks = []

    def stop_after_the_first_gradient(amount):
        ticks.append(amount)
        if amount == 8.0:
            raise Stopped

    with pytest.raises(Stopped):
        routing.learn_routing(bench, load_trained(bench), stop_after_the_first_gradient, Learning("relaxed", 16))
    run_controller(copy, "relaxed", rollouts=16)
    whole, again = (load_routing(Workbench.open(one)).policy.state_dict() for one in (run, copy))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# What both share is shown by one of them.
LEARNERS = pytest.mark.parametrize("method", ["relaxed", pytest.param("reinforce", marks=pytest.mark.slow)])


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(dict(row))


@LEARNERS
def test_rows_of_a_training_are_in_the_file_and_reach_the_trackers(run, method):
    run.forget("controller")
    shutil.rmtree(run.controller, ignore_errors=True)
    rows = Rows()
    tracker = QueuedSink(lambda: rows, name="rows")
    run_controller(run, method, rollouts=16, trackers=(tracker,))
    written = [json.loads(line) for line in (run.path / routing.CURVE_NAME).read_text().splitlines()]
    assert [row["step"] for row in written] == ([1, 2] if method == "relaxed" else [1, 2, 3, 4])
    assert [row["loss"] for row in rows.rows] == [row["loss"] for row in written]
    with pytest.raises(ValueError, match="closed"):
        tracker.write({})


def one_process(rank, folder, method):
    torch.set_num_threads(1)
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    with joined("cpu", environment=environment, init_method=f"file://{folder.parent / method}") as world:
        run_controller(RunDirectory.open(folder), method, rollouts=16, world=world)


@LEARNERS
def test_two_processes_share_the_images_and_leave_one_controller(run, tmp_path, method):
    folder = Path(shutil.copytree(run.path, tmp_path / "copy"))
    copy = RunDirectory.open(folder)
    copy.forget("controller")
    copy.save()
    shutil.rmtree(copy.controller, ignore_errors=True)
    multiprocessing.start_processes(one_process, (folder, method), nprocs=2, start_method="fork")
    copy = RunDirectory.open(folder)
    assert copy.section("controller")["rollouts"] == 16
    rows = [json.loads(line) for line in (folder / routing.CURVE_NAME).read_text().splitlines()]
    assert [row["step"] for row in rows] == ([1] if method == "relaxed" else [1, 2]), "half of what one would do"
    assert int(load_routing(Workbench.open(copy)).mask(5).sum()) == 5


def test_unknown_methods_and_amounts_are_refused(run):
    with pytest.raises(RunError, match="choose one of auto, pairs"):
        run_controller(run, "magic")
    with pytest.raises(RunError, match="rollouts must be >= 0"):
        Learning("relaxed", -1)


def test_a_picture_can_be_drawn_with_the_policy_rolling_dice_by_its_seed(run, tmp_path):
    run_controller(run, "budget")
    folder = Path(shutil.copytree(run.path, tmp_path / "copy"))
    loaded = load_students(folder / "students", fingerprint=None)
    for layer in loaded.bank.layers:
        for _ in range(loaded.readiness.config.minimum_updates):
            loaded.readiness.observe(layer, 0.001, 0.03)
    loaded.readiness.flush()
    fingerprint = str(run.section("teacher")["fingerprint"])
    save_students(folder / "students", loaded.bank, loaded.readiness, fingerprint=fingerprint)
    drawn = [
        draw(folder, "fox on blue", 0.5, 3, tmp_path / f"{number}.png", policy_mode="stochastic", temperature=2.0)
        for number in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert len(drawn[0].routing) == SMALL.steps
    assert all("of 6 layers" in line for line in drawn[0].routing)
    assert 0 < drawn[0].by_student < drawn[0].calls
    with pytest.raises(RunError, match="threshold or stochastic, not 'gumbel'"):
        draw(folder, "fox on blue", 0.5, 3, tmp_path / "x.png", policy_mode="gumbel")
