import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor
from ttr_distill.checkpoint import CheckpointError, check_keys, load_checkpoint, save_checkpoint

TraceFunction = Callable[[FrameType, str, object], object]


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(33, 17, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "optim/single:0.adam.0.step": torch.tensor(float(seed)),
        "replay/0.k": torch.randn(2, 3, 5, generator=generator),
        "mask": torch.tensor([True, False]),
    }


def assert_holds(path: Path, seed: int) -> None:
    loaded = load_checkpoint(path, fingerprint="teacher-a")
    expected = tensors(seed)
    assert loaded.manifest == {"seed": seed, "fingerprint": "teacher-a"}
    assert set(loaded.tensors) == set(expected)
    assert all(torch.equal(loaded.tensors[name], value) for name, value in expected.items())


def save(path: Path, seed: int) -> Path:
    return save_checkpoint(path, tensors(seed), {"seed": seed}, fingerprint="teacher-a")


def test_a_round_trip_keeps_every_bit_and_the_newest_save_wins(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        save(tmp_path / "c", seed)
        assert_holds(tmp_path / "c", seed)
    assert sorted(entry.name for entry in (tmp_path / "c").iterdir()) == ["LATEST", "save-000003"]


def test_groups_are_files_and_can_be_loaded_alone(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    assert {file.stem for file in saved.glob("*.safetensors")} == {"model", "optim", "replay"}
    (saved / "optim.safetensors").write_bytes(b"broken")
    assert set(load_checkpoint(tmp_path, groups=("model",)).tensors) == {"weight", "half", "mask"}
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path)


def test_views_and_shared_memory_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path, {"a": base.t(), "b": base.t(), "c": base[1:]}, {})
    loaded = load_checkpoint(tmp_path).tensors
    assert torch.equal(loaded["a"], base.t())
    assert torch.equal(loaded["c"], base[1:])


def test_manifest_lists_size_and_hash_of_each_file(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    files = json.loads((saved / "manifest.json").read_text())["files"]
    for name, entry in files.items():
        content = (saved / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "nowhere")
    assert one_line(error) == f"there is no checkpoint at {tmp_path / 'nowhere'}"


def test_another_model_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path, fingerprint="teacher-b")
    assert "teacher-a" in one_line(error)
    assert "teacher-b" in one_line(error)


def test_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    text = (saved / "manifest.json").read_text().replace('"schema": 1', '"schema": 7')
    (saved / "manifest.json").write_text(text)
    (tmp_path / "LATEST").write_text(f"{saved.name} {hashlib.sha256(text.encode()).hexdigest()}\n")
    with pytest.raises(CheckpointError, match=r"schema 7, this version reads 1"):
        load_checkpoint(tmp_path)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "replay.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert "replay.safetensors" in one_line(error)


def test_facts_must_be_finite_json_and_nothing_is_left_behind(tmp_path: Path) -> None:
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match="finite JSON values"):
            save_checkpoint(tmp_path, {}, {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_check_keys_names_missing_and_unknown() -> None:
    check_keys("x", ["a"], ["a"])
    with pytest.raises(CheckpointError, match="lacks entries: b"):
        check_keys("x", ["a"], ["a", "b"])
    with pytest.raises(CheckpointError, match="has unknown entries: c, d"):
        check_keys("x", ["a", "d", "c"], ["a"])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine")
    save(path, 1)
    return path


def test_500_damages_are_each_noticed_and_nothing_is_loaded(pristine: Path) -> None:
    """Truncations and single flipped bits, anywhere in any file."""
    draw = random.Random(0)
    files = sorted(entry for entry in pristine.rglob("*") if entry.is_file())
    assert len(files) == 5
    for case in range(500):
        file = draw.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        if case % 3 == 0:
            damaged = damaged[: draw.randrange(len(damaged))]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(pristine, fingerprint="teacher-a")
        one_line(error)
        file.write_bytes(whole)
    assert_holds(pristine, 1)


def in_a_child(work: Callable[[], None]) -> int | None:
    """Do the work in a forked process; return the signal that killed it, or ``None``."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_at_any_byte_the_old_save_survives(tmp_path: Path) -> None:
    """The kernel kills the process at the byte where a file would grow beyond the limit, for many limits."""
    import resource

    sizes = [file.stat().st_size for file in save(tmp_path, 1).iterdir()]
    limits = [*range(0, max(sizes), 91), *(size - 1 for size in sizes), max(sizes)]

    def save_at_most(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(tmp_path, 2)

    for limit in limits:
        killed = in_a_child(partial(save_at_most, limit))
        assert killed == (signal.SIGXFSZ if limit < max(sizes) else None)
        assert_holds(tmp_path, 1 if killed else 2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_at_any_line_a_whole_save_survives(tmp_path: Path) -> None:
    """A process kills itself at its first line, at its second, and so on, until it gets through."""
    source = save_checkpoint.__code__.co_filename
    pristine = tmp_path / "pristine"
    save(pristine, 1)

    def save_until_line(path: Path, number: int) -> None:
        left = [number]

        def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
            if frame.f_code.co_filename != source:
                return None
            left[0] -= event == "line"
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        save(path, 2)

    held = []
    for number in range(1, 400, 4):
        path = shutil.copytree(pristine, tmp_path / str(number))
        killed = in_a_child(partial(save_until_line, path, number))
        seed = load_checkpoint(path).manifest["seed"]
        assert seed in (1, 2)
        assert_holds(path, 1 if seed == 1 else 2)
        held.append(seed)
        if not killed:
            break
    assert held == sorted(held)
    assert held[-1] == 2
    assert held.count(1) > 25
    assert held.count(2) > 1, "nothing was killed after the pointer had moved"


def save_until_killed(path: Path, first: int, done: Connection) -> None:
    torch.set_num_threads(1)
    for seed in range(first, first + 1000):
        save(path, seed)
        done.send(seed)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Kill a process that saves without pause, at random moments; each time what is there loads and is not older."""
    draw = random.Random(5)
    path = tmp_path / "c"
    save(path, 1)
    newest, interrupted = 1, 0
    for _ in range(30):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=save_until_killed, args=(path, newest + 1, sender))
        process.start()
        sender.close()
        time.sleep(draw.uniform(0.0, 0.06))
        process.kill()
        process.join()
        reported = newest
        while receiver.poll():
            try:
                reported = receiver.recv()
            except EOFError:
                break
        receiver.close()
        interrupted += len([entry for entry in path.iterdir() if entry.name.startswith(("tmp-", "save-"))]) > 1
        found = load_checkpoint(path).manifest["seed"]
        assert isinstance(found, int)
        # A save whose pointer has moved counts, whether or not its process lived to say so.
        assert found in (reported, reported + 1)
        assert_holds(path, found)
        newest = found
    assert interrupted > 5, "the kills never hit a save; the test shows nothing"


@pytest.mark.parametrize("stage", ["save_file", "os.fsync", "rename", "os.replace"])
def test_an_error_in_any_stage_keeps_the_old_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner = {"save_file": "ttr_distill.checkpoint.save_file", "rename": "pathlib.Path.rename"}
        patch.setattr(owner.get(stage, stage), full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert_holds(tmp_path, 1)
    save(tmp_path, 3)
    assert_holds(tmp_path, 3)
