"""The whole job, small: every phase on the real embedded teacher, interrupted and resumed, and the bad days."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ttr_controller.cli import main
from ttr_controller.pipeline.quickstart import PHASES, run_phases
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.serving import draw
from ttr_controller.pipeline.settings import QuickstartSettings
from ttr_controller.pipeline.showing import describe_checkpoint, describe_run
from ttr_controller.report import write_report
from ttr_distill.saved_students import load_students, save_students

SMALL = QuickstartSettings(budget_minutes=0.1, rows=12, columns=12, steps=2, timing_sides=(8, 12))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = RunDirectory.open_or_create(folder, SMALL)
    run_phases(run, tuple(PHASES))
    return folder


def ttr(*arguments: str | Path) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command leaves on standard error."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    return lines[0]


def test_every_phase_is_recorded_and_judged(finished: Path) -> None:
    run = RunDirectory.open(finished)
    assert run.complete
    assert all(run.has(name) for name in PHASES)
    points = run.section("pareto")["points"]
    assert isinstance(points, list)
    by_method = {point["method"]: point for point in points if point["method"] in ("all full", "all student")}
    assert by_method["all full"]["latent_rmse"] == 0.0
    assert by_method["all full"]["psnr"] is None
    assert 0.0 < by_method["all student"]["latent_rmse"] < 0.6
    equal_cost = {point["full_share"] for point in points if point["method"] not in by_method}
    assert len(equal_cost) == 1
    checks = run.results["checks"]
    assert isinstance(checks, list)
    assert all(
        check["passed"] == (check["value"] <= check["limit"]) for check in checks if "at least" not in check["name"]
    )


def test_the_report_is_one_file_without_any_reference(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ttr("report", finished) == 0
    assert "report.html" in capsys.readouterr().out
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4
    for attribute in ("src=", "href="):
        for piece in page.split(attribute)[1:]:
            assert piece[1:].startswith(("data:", "#")), piece[:60]


def test_sampling_and_inspecting_a_finished_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fox.png"
    assert ttr("sample", "fox on blue", "--run", finished, "--quality-speed", "0.5", "--out", out) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "attention calls" in capsys.readouterr().out
    assert ttr("inspect", finished) == 0
    assert "single:3" in capsys.readouterr().out
    assert ttr("inspect", finished / "students") == 0
    assert "near_far" in capsys.readouterr().out


def test_an_unready_student_never_serves(finished: Path, tmp_path: Path) -> None:
    # Two images are too few measurements for a layer to become ready, whatever the slider says.
    drawn = draw(finished, "fox on blue", 1.0, 3, tmp_path / "fox.png")
    assert drawn.by_student == 0
    assert drawn.calls == 6 * SMALL.steps
    assert drawn.latent_rmse == 0.0
    assert drawn.psnr_db is None
    assert sum(drawn.declined.values()) == drawn.calls


def test_the_slider_decides_how_much_a_ready_student_serves(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    loaded = load_students(folder / "students", fingerprint=None)
    for layer in loaded.bank.layers:
        for _ in range(loaded.readiness.config.minimum_updates):
            loaded.readiness.observe(layer, 0.001, 0.03)
    loaded.readiness.flush()
    fingerprint = str(RunDirectory.open(folder).section("teacher")["fingerprint"])
    save_students(folder / "students", loaded.bank, loaded.readiness, fingerprint=fingerprint)
    served = [draw(folder, "fox", speed, 3, tmp_path / "fox.png").by_student for speed in (0.0, 0.5, 1.0)]
    assert served == sorted(served)
    assert served[0] < served[-1]
    assert served[-1] > 0


def test_what_a_run_holds_is_described(finished: Path) -> None:
    facts, layers = describe_run(finished)
    assert facts["state"] == "complete"
    assert [row[0] for row in layers] == ["double:0", "double:1", *(f"single:{index}" for index in range(4))]
    assert all(row[4] == "unready" for row in layers)
    assert describe_checkpoint(finished / "students")[1] == layers


class Stop(Exception):
    """Stands for Ctrl-C at a place that a test can choose."""


class StoppingProgress:
    """Progress that stops the run after some ticks."""

    def __init__(self, ticks: int) -> None:
        self.left = ticks

    def start(self, title: str, work: float) -> int:
        return 0

    def advance(self, phase: int, work: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop

    def finish(self, phase: int) -> None:
        pass


@pytest.mark.parametrize("ticks", [0, 1, 4, 20])
def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(finished: Path, tmp_path: Path, ticks: int) -> None:
    run = RunDirectory.open_or_create(tmp_path / "run", SMALL)
    # The same plan as the unbroken run: it is made from measured times otherwise.
    run.record("plan", dict(RunDirectory.open(finished).section("plan")))
    with pytest.raises(Stop):
        run_phases(run, tuple(PHASES), StoppingProgress(ticks))
    write_report(tmp_path / "run")
    again = RunDirectory.open(tmp_path / "run")
    assert not again.complete
    run_phases(again, ("distillation", "fidelity", "controller"))
    unbroken = RunDirectory.open(finished)
    assert again.section("fidelity") == unbroken.section("fidelity")
    assert again.section("controller")["heatmap"] == unbroken.section("controller")["heatmap"]
    ours, theirs = (
        load_students(folder / "students", fingerprint=None).bank for folder in (tmp_path / "run", finished)
    )
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
# Starting and stopping takes seconds, but many times that on a machine with other work.
@pytest.mark.timeout(900)
def test_ctrl_c_is_one_clear_line_and_the_run_can_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A shell that starts jobs in the background lets them ignore the signal.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from ttr_controller.cli import main; main()"
    command = [sys.executable, "-c", code, "quickstart", "--out", str(folder), "--budget", "0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 500
        while not (folder / "students" / "LATEST").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "interrupted; nothing is lost" in error.splitlines()[-1]
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]
    assert not RunDirectory.open(folder).complete
    assert load_students(folder / "students", fingerprint=None).bank.config.preset == "near_far"


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_one_clear_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (weights,) = (folder / "students").glob("save-*/model.safetensors")
    content = bytearray(weights.read_bytes())
    if damage == "missing":
        shutil.rmtree(folder / "students")
    elif damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    else:
        content[-3] ^= 0x10
        weights.write_bytes(content)
    capsys.readouterr()
    out = tmp_path / "picture.png"
    assert ttr("sample", "fox", "--run", folder, "--out", out) == 1
    assert "students" in one_error_line(capsys)
    assert not out.exists()


def test_bad_arguments_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    cases = [
        (("quickstart", "--out", blocked / "run"), "cannot write to"),
        (("quickstart", "--out", tmp_path / "run", "--preset", "taylor"), "unknown preset 'taylor'"),
        (("quickstart", "--out", tmp_path / "run", "--device", "gpu"), "unknown device 'gpu'"),
        (("quickstart", "--out", tmp_path / "run", "--budget", "soon"), "--budget"),
        (("report", tmp_path / "nothing"), "results.json"),
        (("sample", "fox", "--run", tmp_path / "nothing"), "no run in"),
        (("inspect", tmp_path / "nothing"), "nothing"),
        (("train-controller", tmp_path / "nothing"), "no run in"),
        (("distil",), "distil"),
    ]
    for arguments, expected in cases:
        assert ttr(*arguments) != 0, arguments
        assert expected in one_error_line(capsys)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_a_prompt_the_teacher_does_not_know_names_some_that_it_knows(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ttr("sample", "quantum zeppelin", "--run", finished, "--out", tmp_path / "x.png") == 1
    assert "the teacher draws, for example" in one_error_line(capsys)


def test_a_run_of_another_teacher_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    results = json.loads((folder / "results.json").read_text())
    results["teacher"]["fingerprint"] = "0" * 64
    (folder / "results.json").write_text(json.dumps(results))
    assert ttr("sample", "fox", "--run", folder, "--out", tmp_path / "x.png") == 1
    assert "another embedded teacher" in one_error_line(capsys)
