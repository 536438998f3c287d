"""Write a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Write a file beside the old one, which it replaces only when the block has ended without an error.

    A reader, or a killed writer, finds the old content or the new one, never a part.

    Args:
        path: The file; its folder is made if missing.

    Yields:
        The path to write to, in the same folder.

    Raises:
        OSError: The folder cannot be written or the disk is full; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as ``replaced_atomically`` does.

    Args:
        path: The file; its folder is made if missing.
        content: All of it.

    Raises:
        OSError: The folder cannot be written or the disk is full; the old file is untouched.
    """
    with replaced_atomically(path) as beside:
        beside.write_bytes(content)
