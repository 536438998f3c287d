"""What no text file of the repository holds: promises without an issue, and traces of a machine."""

import re
from collections.abc import Callable
from pathlib import Path

from architecture.tree import Tree, Violation

# Spelt in two parts so that this file does not match itself.
_TODO = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\s*\(#\d+\))")
_MACHINE_PATH = re.compile(
    r"(?<![\w.$~}>-])/(?:wo" + r"rk|ro" + r"ot|tm" + r"p|ho" + r"me|Us" + r"ers)(?:/|\b(?![\w-]))"
)
_URL = re.compile(r"\bhttps?://[^\s\"'`)>]+")
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b")
_NAMESPACE = re.compile(r"https?://www\.w3\.org/")


def _scan(tree: Tree, rule: str, find: Callable[[str], str | None]) -> list[Violation]:
    found = []
    for path, text in tree.texts:
        if _is_licence(path):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            what = find(line)
            if what is not None:
                found.append(Violation(rule, path, number, what))
    return found


def _is_licence(path: Path) -> bool:
    return path.stem.upper().startswith(("LICENSE", "NOTICE"))


def todo(tree: Tree) -> list[Violation]:
    """No open end without the issue that closes it, written ``(#12)`` behind the word."""
    return _scan(tree, "todo", lambda line: "name the issue, or do it" if _TODO.search(line) else None)


def machine_path(tree: Tree) -> list[Violation]:
    """No path of one person's machine."""

    def find(line: str) -> str | None:
        hit = _MACHINE_PATH.search(line)
        return f"{hit.group()!r} exists on one machine only" if hit else None

    return _scan(tree, "machine-path", find)


def address(tree: Tree) -> list[Violation]:
    """No mail address and no web address but XML namespaces: the repository stands for itself."""

    def find(line: str) -> str | None:
        for hit in _URL.finditer(line):
            if not _NAMESPACE.match(hit.group()):
                return f"web address {hit.group()!r}"
        hit = _MAIL.search(line)
        return f"mail address {hit.group()!r}" if hit else None

    return _scan(tree, "address", find)
