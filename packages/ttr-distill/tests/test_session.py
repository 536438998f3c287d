import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionHandler, LayerKey, StepContext
from torch import Tensor, multiprocessing
from ttr_distill.checkpoint import CheckpointError
from ttr_distill.distributed import World, joined
from ttr_distill.image_gate import ImageGate
from ttr_distill.recorded_calls import Captures
from ttr_distill.saved_students import load_students
from ttr_distill.session import CAPTURES, METRICS, DistillSession, SessionConfig
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessConfig
from ttr_distill.training.calibration import CalibrateConfig
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYERS = tuple(LayerKey("single", index) for index in range(2))
DISTILL = DistillConfig(capture=CaptureConfig(16, 8), min_swap_layers=2, heldout_period=4)
STUDENT = preset("near_far", tile=3, top_k=1)


class Imagined:
    """A sampler of two layers and two steps; counts its images and may be stopped at one."""

    layers, heads, width = LAYERS, 2, 16

    def __init__(self, make_call: CallMaker, native: Native, stop_at: int | None = None) -> None:
        self._make_call = make_call
        self._native = native
        self._stop_at = stop_at
        self.asked: list[tuple[str, int]] = []

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], handler: AttentionHandler | None = None
    ) -> SimpleNamespace:
        self.asked.append((prompts[0], seeds[0]))
        latent = torch.zeros(())
        with torch.inference_mode():
            if handler is not None:
                handler.begin_run()
            try:
                for step in range(2):
                    for layer in LAYERS:
                        if len(self.asked) == self._stop_at and step:
                            raise KeyboardInterrupt
                        call = self._make_call(97 * seeds[0] + step, layer=layer, step=StepContext(1 - step / 2))
                        answer = self._native(call) if handler is None else handler(call, self._native)
                        latent = latent + answer
            finally:
                if handler is not None:
                    handler.end_run()
        return SimpleNamespace(latent=latent)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def config_of(images: int = 6, **others: object) -> SessionConfig:
    return SessionConfig(STUDENT, DISTILL, images=images, seed=5, **others)  # type: ignore[arg-type]


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_interrupted_session_ends_as_an_unbroken_one(
    tmp_path: Path, make_call: CallMaker, native: Native, calibrated: bool
) -> None:
    config = config_of(calibrate=CalibrateConfig(3, 8) if calibrated else None)
    sampler = Imagined(make_call, native)
    whole = DistillSession(tmp_path / "whole", sampler, ["a", "b"], config, fingerprint="f")
    seen: list[tuple[int, int]] = []
    kept = whole.run(lambda done, of: seen.append((done, of)))
    assert sampler.asked == [("a", 5), ("b", 6), ("a", 7), ("b", 8), ("a", 9), ("b", 10)]
    total = 9 if calibrated else 6
    assert seen == [(done + 1, total) for done in range(total)]
    broken = tmp_path / "broken"
    for stop_at in (4, None):
        one = DistillSession(broken, Imagined(make_call, native, stop_at), ["a", "b"], config, fingerprint="f")
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                one.run()
        else:
            assert one.run() == kept
    assert_equal(dict(whole.bank.state_dict()), dict(one.bank.state_dict()))
    assert whole.readiness.state_dict() == one.readiness.state_dict()
    if not calibrated:
        last = {(row["run"], row["layer"]): row for row in rows(broken)}
        assert list(last.values()) == rows(tmp_path / "whole"), "a run written twice counts once: losses are the same"
        assert len(last) == 12
    saved = load_students(broken / "students", fingerprint="f")
    assert_equal(dict(saved.bank.state_dict()), dict(whole.bank.state_dict()))


def test_a_finished_session_does_nothing_and_more_images_go_on(
    tmp_path: Path, make_call: CallMaker, native: Native
) -> None:
    DistillSession(tmp_path, Imagined(make_call, native), ["a"], config_of(3), fingerprint="f").run()
    sampler = Imagined(make_call, native)
    again = DistillSession(tmp_path, sampler, ["a"], config_of(3), fingerprint="f")
    before = dict(again.bank.state_dict())
    again.run()
    assert sampler.asked == []
    assert_equal(before, dict(again.bank.state_dict()))
    more = DistillSession(tmp_path, sampler, ["a"], config_of(5), fingerprint="f")
    more.run()
    assert sampler.asked == [("a", 8), ("a", 9)]
    assert more.distiller.runs == 5


def test_a_recording_is_made_once_and_learned_from_without_sampling(
    tmp_path: Path, make_call: CallMaker, native: Native
) -> None:
    sampler = Imagined(make_call, native)
    config = config_of(4, calibrate=CalibrateConfig(2, 8))
    first = DistillSession(tmp_path, sampler, ["a"], config, fingerprint="f")
    first.run()
    assert len(sampler.asked) == 4
    assert len(Captures(tmp_path / CAPTURES)) == 16
    longer = DistillSession(tmp_path, sampler, ["a"], config_of(4, calibrate=CalibrateConfig(5, 8)), fingerprint="f")
    longer.run()
    assert len(sampler.asked) == 4
    assert longer.distiller.runs == 5


def test_other_settings_and_models_are_refused(tmp_path: Path, make_call: CallMaker, native: Native) -> None:
    sampler = Imagined(make_call, native)
    DistillSession(tmp_path, sampler, ["a"], config_of(1), fingerprint="f", about={"steps": 2}).run()
    for config, fingerprint, steps, message in (
        (config_of(1), "g", 2, "fingerprint: g here, f there"),
        (config_of(1), "f", 3, "steps: 3 here, 2 there"),
        (SessionConfig(preset("near_far", tile=2), seed=5), "f", 2, "student: "),
    ):
        with pytest.raises(CheckpointError, match=message):
            DistillSession(tmp_path, sampler, ["a"], config, fingerprint=fingerprint, about={"steps": steps})
    (tmp_path / "session.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        DistillSession(tmp_path, sampler, ["a"], config_of(1), fingerprint="f")
    with pytest.raises(ValueError, match="at least one prompt"):
        DistillSession(tmp_path / "new", sampler, [], config_of(1), fingerprint="f")
    for bad in ({"images": 0}, {"save_every": 0}, {"calibrate": CalibrateConfig(), "sharing": "images"}):
        with pytest.raises(ValueError, match=r"at least 1|layer by layer"):
            SessionConfig(STUDENT, **bad)  # type: ignore[arg-type]


def test_images_are_measured_when_all_is_learned(tmp_path: Path, make_call: CallMaker, native: Native) -> None:
    levels: dict[float, set[str]] = {}
    for limit in (10.0, 1e-9):
        sampler = Imagined(make_call, native)
        config = config_of(6, image_gate=ImageGate(limit, prompts=("c",)))
        folder = tmp_path / str(limit)
        # Every distance is near enough, so that the images decide.
        session = DistillSession(folder, sampler, ["a", "b"], config, fingerprint="f")
        loose = ReadinessConfig(10.0, 10.0, minimum_updates=1, image_limit=limit)
        session.readiness.config = loose
        session.run()
        drawn = sampler.asked[6:]
        assert set(drawn) == {("c", 11), ("c", 12)}, "seeds that nothing was learned from"
        assert drawn[:4] == [("c", 11), ("c", 12)] * 2, "once exactly, once with all students"
        saved = load_students(folder / "students", fingerprint="f", readiness=replace(loose, image_limit=None))
        levels[limit] = {saved.readiness.level(layer) for layer in LAYERS}
        assert all(saved.readiness[layer].image_limit == limit for layer in LAYERS)
        assert all(saved.readiness.distance_level(layer) == "ready" for layer in LAYERS)
        reopened = DistillSession(folder, sampler, ["a", "b"], config, fingerprint="f")
        assert reopened.readiness.config.image_limit == limit
    assert levels == {10.0: {"ready"}, 1e-9: {"unready"}}


def test_memory_is_asked_for_before_every_image_and_never_within(
    tmp_path: Path, make_call: CallMaker, native: Native
) -> None:
    sampler = Imagined(make_call, native)
    asked: list[tuple[int, int]] = []

    def reserve(needed: int) -> None:
        asked.append((len(sampler.asked), needed))

    session = DistillSession(tmp_path, sampler, ["a"], config_of(4), fingerprint="f", reserve=reserve)
    session.run()
    assert [images for images, _ in asked] == [0, 1, 2, 3]
    assert all(needed > 0 for _, needed in asked)
    assert asked[-1][1] == session.distiller.memory_bytes
    assert asked[0][1] > asked[1][1] == asked[3][1], "the size of a call is known after the first image"


def one_process(rank: int, folder: Path, sharing: str, make_call: CallMaker, native: Native) -> None:
    environment = {"RANK": str(rank), "WORLD_SIZE": "2"}
    with joined("cpu", environment=environment, init_method=f"file://{folder / 'meet'}") as world:
        shared(folder / "run", world, sharing, make_call, native)


def shared(folder: Path, world: World, sharing: str, make_call: CallMaker, native: Native) -> None:
    config = config_of(4, sharing=sharing, calibrate=CalibrateConfig(2, 8) if sharing == "calibrated" else None)
    session = DistillSession(folder, Imagined(make_call, native), ["a", "b"], config, fingerprint="f", world=world)
    session.run()


@pytest.mark.parametrize("sharing", ["layers", "images"])
def test_two_processes_make_one_checkpoint(tmp_path: Path, make_call: CallMaker, native: Native, sharing: str) -> None:
    multiprocessing.start_processes(one_process, (tmp_path, sharing, make_call, native), nprocs=2, start_method="fork")
    found = load_students(tmp_path / "run" / "students", fingerprint="f", training=True)
    assert found.bank.layers == LAYERS
    assert {row["layer"] for row in rows(tmp_path / "run")} == {"single:0", "single:1"}
    measured = [found.readiness[layer].updates for layer in LAYERS]
    assert measured == [8, 8], "of all four images"
    if sharing == "layers":
        shared(tmp_path / "alone", World(), sharing, make_call, native)
        alone = load_students(tmp_path / "alone" / "students", fingerprint="f")
        assert_equal(dict(alone.bank.state_dict()), dict(found.bank.state_dict()))
        assert alone.readiness.state_dict() == found.readiness.state_dict()


PROGRAM = """
import os, signal, sys, torch
from ttr_distill.session import DistillSession, SessionConfig
from ttr_distill.student.presets import preset
from ttr_distill.tiny import TinySampler, load_teacher
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig
torch.set_num_threads(1)
kill_at = int(sys.argv[2])
teacher = load_teacher()
sampler = TinySampler(teacher, rows=8, columns=8, steps=2)
distill = DistillConfig(CaptureConfig(16, 8), min_swap_layers=5, max_swap_layers=5, train_steps_per_call=5,
                        heldout_period=0)
config = SessionConfig(preset("near_far", tile=2, top_k=1), distill, images=2)
session = DistillSession(sys.argv[1], sampler, ["fox"], config, fingerprint=teacher.fingerprint)
def after(done, of):
    print(session.distiller.updates, flush=True)
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
session.run(after)
"""


@pytest.mark.slow
def test_50_updates_a_kill_and_50_more_are_100_updates(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")

    def run(folder: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / folder), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    whole = run("whole", 0)
    assert whole.stdout.split() == ["50", "100"], whole.stderr[-2000:]
    assert run("broken", 1).returncode == -signal.SIGKILL
    assert 0 < len(rows(tmp_path / "broken")) < len(rows(tmp_path / "whole"))
    assert run("broken", 0).returncode == 0
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    found, expected = (load_students(tmp_path / name / "students", fingerprint=None) for name in ("broken", "whole"))
    assert_equal(dict(found.bank.state_dict()), dict(expected.bank.state_dict()))
