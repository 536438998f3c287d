import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
from ttr_distill.files import replaced_atomically, write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new and longer")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_in_the_block_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def write() -> None:
        with replaced_atomically(target) as beside:
            assert beside.parent == target.parent
            beside.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def write_at_most(target: Path, content: bytes, limit: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    write_atomically(target, content)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_at_any_byte_the_old_file_survives(tmp_path: Path) -> None:
    target, content = tmp_path / "file", b"new and longer"
    write_atomically(target, b"old")
    for limit in range(len(content) + 1):
        process = multiprocessing.get_context("fork").Process(target=write_at_most, args=(target, content, limit))
        process.start()
        process.join()
        killed = limit < len(content)
        assert process.exitcode == (-signal.SIGXFSZ if killed else 0)
        assert target.read_bytes() == (b"old" if killed else content)
