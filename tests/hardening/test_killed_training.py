"""Training that is killed again and again ends with the students that it would have had."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from ttr_distill import load_students

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")

IMAGES = 25

TRAIN = """
import sys
from pathlib import Path
from ttr_distill import (
    DistillConfig, Distiller, ReadinessTracker, StudentBank, load_students, preset, save_students)
from ttr_distill.tiny import TinySampler, load_teacher, training_prompts

folder, images = Path(sys.argv[1]), int(sys.argv[2])
sampler = TinySampler(load_teacher(), rows=4, columns=4, steps=2, guidance=1.0)
config = DistillConfig(min_swap_layers=6, replay_bytes=200_000)
if folder.exists():
    saved = load_students(folder, fingerprint="teacher", training=True)
    distiller = Distiller(saved.bank, saved.readiness, config, seed=3)
    distiller.load_state_dict(saved.training)
else:
    bank = StudentBank.for_layers(
        preset("near_far", tile=2, top_k=1), sampler.layers, sampler.heads, sampler.width, seed=3)
    distiller = Distiller(bank, ReadinessTracker(), config, seed=3)
print("begins at", distiller.runs, flush=True)
prompts = training_prompts()
for run in range(distiller.runs, images):
    sampler.sample([prompts[run % len(prompts)]], [run], distiller)
    distiller.raise_pending()
    save_students(folder, distiller.bank, distiller.readiness, distiller, fingerprint="teacher")
    print("saved", run, flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, str(folder), str(IMAGES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    saved = load_students(folder, fingerprint="teacher", training=True)
    assert saved.training is not None
    tensors = dict(saved.bank.state_dict())
    return tensors | {name: value for name, value in saved.training.tensors.items() if name.startswith("optim/")}


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path: Path, long: bool) -> None:
    whole = start(tmp_path / "whole")
    draw = random.Random(time.time_ns() if long else 5)
    begins: list[int] = []
    for _ in range(20 if long else 2):
        process = start(tmp_path / "killed")
        assert process.stdout is not None
        begins.append(int(process.stdout.readline().rsplit(" ", 1)[-1]))
        if begins[-1] == IMAGES:
            process.communicate()
            break
        process.stdout.readline()
        # In the middle of drawing, learning or saving: an image takes some hundredths of a second.
        time.sleep(draw.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        load_students(tmp_path / "killed", fingerprint="teacher", training=True)
    assert begins == sorted(begins)
    assert begins[0] == 0
    assert 0 < begins[1] < IMAGES, "killed in the middle"
    last = finish(start(tmp_path / "killed"))
    assert begins[-1] == IMAGES or f"begins at {begins[-1]}\n" not in last
    finish(whole)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert any(value.ndim and bool(value.float().std() > 0) for value in expected.values())
    assert all(torch.equal(found[name], value) for name, value in expected.items())
