"""A full disk and a folder that cannot be written: the old files stay, the picture is made, the error says why."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits of a process are POSIX")

PREPARE = """
import os, resource, signal, sys
from pathlib import Path
import torch
from attn_dispatch import LayerKey
from ttr_controller.report import write_report
from ttr_distill import (
    CheckpointError, DistillConfig, Distiller, JsonlSink, ReadinessTracker, StudentBank, load_students, preset,
    save_students,
)
from ttr_distill.files import write_atomically
from ttr_distill.tiny import TinySampler, load_teacher, training_prompts

folder = Path(sys.argv[1])
layers = tuple(LayerKey("single", index) for index in range(1))


def bank(seed):
    return StudentBank.for_layers(preset("hkr"), layers, 4, 32, seed=seed)


def weights(students):
    return {name: value.clone() for name, value in students.state_dict().items()}


def save(seed):
    save_students(folder / "students", bank(seed), ReadinessTracker(), fingerprint="teacher")


def fill_the_disk(room):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def make_read_only():
    for one in (folder, *folder.rglob("*")):
        one.chmod(0o555 if one.is_dir() else 0o444)
    if os.geteuid() == 0:
        # Permissions do not bind root.
        os.seteuid(65534)


def must_fail(action):
    try:
        action()
    except OSError as error:
        assert error.strerror, error
        return
    raise AssertionError("nothing was raised")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's are for their owner alone."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        Path(temporary).chmod(0o755)
        yield Path(temporary)


def run(folder: Path, code: str) -> None:
    """Run code behind ``PREPARE`` in a process of its own."""
    command = [sys.executable, "-c", PREPARE + textwrap.dedent(code), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    for one in (folder, *folder.rglob("*")):
        one.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "all is well" in done.stdout


@pytest.mark.parametrize("trouble", ["fill_the_disk(20_000)", "make_read_only()"])
def test_the_old_checkpoint_survives(trouble: str, folder: Path) -> None:
    run(
        folder,
        f"""
        save(1)
        expected = weights(bank(1))
        {trouble}
        for _ in range(3):
            must_fail(lambda: save(2))
            found = weights(load_students(folder / "students", fingerprint="teacher").bank)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("all is well")
        """,
    )
    assert not [path for path in (folder / "students").rglob("*") if path.name.startswith("tmp-") and path.is_file()]


@pytest.mark.parametrize("trouble", ["fill_the_disk(1000)", "make_read_only()"])
def test_a_file_is_written_whole_or_not_at_all(trouble: str, folder: Path) -> None:
    run(
        folder,
        f"""
        write_atomically(folder / "page.html", b"old")
        {trouble}
        must_fail(lambda: write_atomically(folder / "page.html", b"new" * 1000))
        must_fail(lambda: write_atomically(folder / "sub" / "new.html", b"new" * 1000))
        assert (folder / "page.html").read_bytes() == b"old"
        assert not (folder / "sub" / "new.html").exists()
        print("all is well")
        """,
    )
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["page.html"]


@pytest.mark.parametrize("trouble", ["fill_the_disk(1500)", "make_read_only()"])
def test_a_picture_is_never_lost_to_the_log_of_its_training(trouble: str, folder: Path) -> None:
    """The metrics file is full in the middle of a run: training says so afterwards, the pictures are bit-equal."""
    run(
        folder,
        f"""
        sampler = TinySampler(load_teacher(), rows=4, columns=4, steps=2)
        prompts = training_prompts()[:4]
        expected = [sampler.sample([prompt], [0]).images for prompt in prompts]
        students = StudentBank.for_layers(
            preset("near_far", tile=2, top_k=1), sampler.layers, sampler.heads, sampler.width)
        config = DistillConfig(min_swap_layers=6, heldout_period=0)
        try:
            (folder / "logs").mkdir()
            {trouble}
            sink = JsonlSink(folder / "logs" / "metrics.jsonl")
        except PermissionError as error:
            assert error.strerror
        else:
            distiller = Distiller(students, ReadinessTracker(), config, sinks=(sink,))
            for prompt, wanted in zip(prompts, expected, strict=True):
                assert torch.equal(sampler.sample([prompt], [0], distiller).images, wanted)
            must_fail(distiller.raise_pending)
            # What was written is whole lines, but perhaps for the last.
            lines = (folder / "logs" / "metrics.jsonl").read_text().split("\\n")
            assert all(line.startswith("{{") and line.endswith("}}") for line in lines[:-1]), lines
        print("all is well")
        """,
    )
