"""What the rules look at: the workspace's Python modules and its text files."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_TEXT_SUFFIXES = (
    ".py",
    ".md",
    ".toml",
    ".yml",
    ".yaml",
    ".json",
    ".txt",
    ".cfg",
    ".html",
    ".j2",
    ".css",
    ".js",
    ".tex",
    ".sh",
)
_TEXT_NAMES = ("run", ".gitignore", ".python-version")
_TEXT_PLACES = (".ci", ".github", "benchmarks", "docs", "examples", "packages", "scripts", "tests")
_PYTHON_PLACES = ("packages", "tests", "scripts", "examples", "benchmarks")
_SKIPPED_FOLDERS = ("__pycache__", "node_modules", "dist", "build")


class Violation(NamedTuple):
    """One place that breaks one rule."""

    rule: str
    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path.as_posix()}:{self.line}: [{self.rule}] {self.what}"


@dataclass(frozen=True)
class Module:
    """One Python file.

    Attributes:
        path: Relative to the workspace's root.
        name: Dotted module name for files below ``packages/*/src``, else empty.
        syntax: Parsed file.
        text: The file as written.
    """

    path: Path
    name: str
    syntax: ast.Module
    text: str

    @property
    def package(self) -> str:
        """Top-level import name, empty outside ``src``."""
        return self.name.partition(".")[0]

    @property
    def is_package(self) -> bool:
        """Whether the file is an ``__init__.py``."""
        return self.path.name == "__init__.py"


@dataclass(frozen=True)
class Tree:
    """The workspace as the rules see it.

    Attributes:
        root: Folder of the workspace.
        sources: Modules below ``packages/*/src``.
        others: All other Python files: tests, scripts, benchmarks, examples, noxfile.
        texts: Every text file that belongs to the repository, relative to ``root``, with its content.
    """

    root: Path
    sources: tuple[Module, ...]
    others: tuple[Module, ...]
    texts: tuple[tuple[Path, str], ...]

    def by_name(self) -> dict[str, Module]:
        """Source modules by dotted name."""
        return {module.name: module for module in self.sources}


def read_tree(root: Path) -> Tree:
    """Read and parse the workspace at ``root``."""
    sources: list[Module] = []
    others: list[Module] = []
    for path in sorted(_python_files(root)):
        relative = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        module = Module(relative, _module_name(relative), ast.parse(text, filename=str(path)), text)
        (sources if module.name else others).append(module)
    texts = tuple((path.relative_to(root), path.read_text(encoding="utf-8")) for path in sorted(_text_files(root)))
    return Tree(root, tuple(sources), tuple(others), texts)


def _module_name(relative: Path) -> str:
    parts = relative.parts
    if len(parts) < 5 or parts[0] != "packages" or parts[2] != "src":
        return ""
    names = list(relative.with_suffix("").parts[3:])
    if names[-1] == "__init__":
        names.pop()
    return ".".join(names)


def _files_below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        below = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in below[:-1])
        if not hidden and path.is_file():
            yield path


def _python_files(root: Path) -> Iterator[Path]:
    yield from root.glob("*.py")
    for place in _PYTHON_PLACES:
        yield from (path for path in _files_below(root / place) if path.suffix == ".py")


def _text_files(root: Path) -> Iterator[Path]:
    candidates = [path for path in root.iterdir() if path.is_file()]
    for place in _TEXT_PLACES:
        candidates.extend(_files_below(root / place))
    for path in candidates:
        if path.suffix in _TEXT_SUFFIXES or path.name in _TEXT_NAMES:
            yield path
