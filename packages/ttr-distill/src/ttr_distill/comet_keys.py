"""Names of Comet experiments: keys that Comet accepts, and a display name that says when and from which commit."""

import os
import re
import secrets
from datetime import datetime
from pathlib import Path

SHORTEST, LONGEST = 32, 50
"""Length of an experiment key in characters."""
NO_GIT = "nogit"
_KEPT = re.compile(r"[^0-9A-Za-z]")
_HASH = re.compile(r"[0-9a-f]{7,64}")


def normalize_experiment_key(value: str, *, allow_empty: bool = False) -> str:
    """Make a key out of any text: letters and digits only, filled with ``X`` to 32 characters, cut at 50.

    Args:
        value: What the user wrote.
        allow_empty: Answer an empty text for one without letters and digits, instead of a random key.
    """
    kept = _KEPT.sub("", value)
    if not kept:
        return "" if allow_empty else f"exp{secrets.token_hex(16)}"
    return kept.ljust(SHORTEST, "X")[:LONGEST]


def git_hash(anchor: Path | str, length: int) -> str:
    """Read the commit that is checked out around a path, without running git.

    Args:
        anchor: A file or folder.
        length: Characters of the hash.

    Returns:
        The start of the hash; ``"nogit"`` if there is no repository or it cannot be read.
    """
    start = Path(anchor).resolve()
    for folder in (start, *start.parents):
        if (folder / ".git").exists():
            try:
                found = _head(folder / ".git")
            except (OSError, UnicodeDecodeError):
                return NO_GIT
            return found[:length] if _HASH.fullmatch(found) else NO_GIT
    return NO_GIT


def generate_experiment_key(anchor: Path | str, now: datetime) -> str:
    """Make a key from the commit, the time to the microsecond and the process."""
    stamp = now.strftime("%Y%m%d%H%M%S%f")
    return normalize_experiment_key(f"{git_hash(anchor, 7)}{stamp}{os.getpid() % 100_000:05d}")


def display_name(anchor: Path | str, now: datetime) -> str:
    """Make a name people can read: ``YYYY-MM-DD-HHMMSS-<six characters of the commit>``."""
    return f"{now.strftime('%Y-%m-%d-%H%M%S')}-{git_hash(anchor, 6)}"


def _head(git: Path) -> str:
    """Resolve ``HEAD``; a work tree's ``.git`` is a file that says where its folder is."""
    if git.is_file():
        git = (git.parent / git.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")).resolve()
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    common = git / "commondir"
    shared = (git / common.read_text(encoding="utf-8").strip()).resolve() if common.exists() else git
    for folder in (git, shared):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").strip()
    for line in (shared / "packed-refs").read_text(encoding="utf-8").splitlines():
        found, _, ref = line.partition(" ")
        if ref == name:
            return found
    return NO_GIT
