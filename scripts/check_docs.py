"""Check that every measured figure of a document stands in a result file: one line per violation, status 1 if any.

    python scripts/check_docs.py

A figure is a number with a unit of time, memory, speed, share or ratio: ``3.8x``, ``12 ms``, ``40 %``. Looked at are
the Markdown files of the root, of the packages and of ``docs`` without the changelog; code and comments are not. A
figure is accounted for in one of five ways.

* It is in a block that ``scripts/write_benchmarks.py`` generates, and the block is what it would generate now.
* It is in a block ``<!-- NAME: begin -->`` to ``<!-- NAME: end -->`` that another script generates: a file
  ``benchmarks/results/NAME*.json`` holds the number, or two of a row whose ratio it is.
* ``<!-- from: FILE#PATH -->`` follows it: that value of ``benchmarks/results/FILE`` is the figure, as rounded. A path
  is names with dots between; ``rows[scene=full-width block, 1K;method=exact].milliseconds`` picks one item of a list,
  and a name with other characters stands in double quotes.
* Its paragraph, list item or table row names a test, ``test_...``, that exists: the test holds it.
* ``<!-- no result: KIND -->`` in its paragraph says that it is no measurement: a ``bound``, a ``setting``, a ``size``
  of something shipped, ``arithmetic``, or ``published`` by others.

Needs the standard library alone.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from benchmark_tables import ROOT, results
from write_benchmarks import documents, stale

KINDS = ("arithmetic", "bound", "published", "setting", "size")
FIGURE = re.compile(
    r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s?"
    r"([x\u00d7](?!\s*\d)|times|ms|us|µs|s|seconds|minutes|%|dB|KiB|MiB|GiB|kB|MB|GB|TFLOP/s|GFLOP/s)(?!\w)"
)
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
CODE = re.compile(r"^```.*?^```[^\n]*$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
OWN_BLOCK = re.compile(r"<!-- figures: [\w-]+ -->.*?<!-- end of figures -->", re.DOTALL)
OTHER_BLOCK = re.compile(r"<!-- ([\w-]+): begin -->(.*?)<!-- \1: end -->", re.DOTALL)
SEGMENT = re.compile(r"(?:\"([^\"]*)\"|([\w -]+))(?:\[([^\]]*)\])?(?:\.|$)")
ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s|\s*\|")
SCALES = (1.0, 100.0, 1e3, 1e-3, 2.0**-20)
"""A share is shown in percent, seconds in milliseconds, bytes in MiB."""


class Violation(NamedTuple):
    """A figure that nothing holds, or a document that is out of date."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path.as_posix()}:{self.line}: {self.what}"


class Unit(NamedTuple):
    """A paragraph, list item or table row.

    Attributes:
        line: Number of its first line.
        text: Its lines.
    """

    line: int
    text: str


def check(root: Path = ROOT) -> list[Violation]:
    """Check every document of a workspace."""
    found = results(root / "benchmarks" / "results")
    files = {one.name: one.data for one in found}
    tests = known_tests(root)
    violations = [
        Violation(path.relative_to(root), 1, "run scripts/write_benchmarks.py: its figures are out of date")
        for path in stale(root, found)
    ]
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        for line, what in check_text(text, files, tests):
            violations.append(Violation(path.relative_to(root), line, what))
    return violations


def check_text(text: str, files: Mapping[str, object], tests: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield line and complaint for every figure of a document that is not accounted for.

    Args:
        text: The document.
        files: Result files by name.
        tests: Names of tests, and of files with tests.
    """
    text = OWN_BLOCK.sub(_blank, text)
    for block in OTHER_BLOCK.finditer(text):
        yield from _check_block(block, text, files)
    for unit in units(OTHER_BLOCK.sub(_blank, text)):
        yield from _check_unit(unit, files, tests)


def units(text: str) -> Iterator[Unit]:
    """Cut a document, its code blanked out, into paragraphs, list items and table rows."""
    kept: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if kept and (not line.strip() or ITEM.match(line)):
            yield Unit(start, "\n".join(kept))
            kept = []
        if line.strip():
            start = start if kept else number
            kept.append(line)


def known_tests(root: Path) -> frozenset[str]:
    """Names of test functions and of the files that hold them."""
    names: set[str] = set()
    for folder in (root / "tests", *root.glob("packages/*/tests")):
        for path in folder.rglob("test_*.py"):
            names |= {path.name, path.stem, *re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))}
    return frozenset(names)


def value_at(files: Mapping[str, object], address: str) -> float:
    """The number at ``FILE#PATH``.

    Raises:
        ValueError: There is no such file, or no single number at the path.
    """
    name, _, path = address.partition("#")
    if name not in files:
        raise ValueError(f"there is no result file {name!r}")
    value = files[name]
    for segment in SEGMENT.finditer(path):
        key = segment[1] or segment[2]
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{name} has no {key!r} in {path!r}")
        value = value[key]
        if segment[3] is not None:
            value = _pick(value, segment[3], address)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{address} is no number")
    return float(value)


def _pick(items: object, wanted: str, address: str) -> object:
    """The one item of a list whose members are those of ``a=b;c=d``."""
    conditions = [part.partition("=")[::2] for part in wanted.split(";")]
    hits = [
        one
        for one in (items if isinstance(items, list) else [])
        if isinstance(one, dict) and all(str(one.get(key)) == value for key, value in conditions)
    ]
    if len(hits) != 1:
        raise ValueError(f"{address}: {len(hits)} items with {wanted}")
    return hits[0]


def shows(text: str, value: float, scales: Sequence[float] = SCALES) -> bool:
    """Whether a number as written is a value, rounded to the digits shown, in some unit."""
    shown, digits = float(text.replace(",", "")), len(text.partition(".")[2])
    # A hair more than half of the last digit: halves are rounded either way.
    return any(abs(shown - value * scale) <= 0.5001 * 10.0**-digits for scale in scales)


def _check_unit(unit: Unit, files: Mapping[str, object], tests: frozenset[str]) -> Iterator[tuple[int, str]]:
    words = set(re.findall(r"\btest_\w+(?:\.py)?", COMMENT.sub("", unit.text)))
    prose = CODE.sub(_blank, unit.text)
    kinds = re.findall(r"<!-- no result: (\w+) -->", prose)
    for kind in kinds:
        if kind not in KINDS:
            yield unit.line, f"{kind!r} is no reason to have no result; there are {', '.join(KINDS)}"
    figures = list(FIGURE.finditer(COMMENT.sub(_blank, prose)))
    accounted: set[int] = set()
    for marker in re.finditer(r"<!-- from: (.*?) -->", prose):
        before = [one for one in figures if one.end() <= marker.start()]
        complaint = _check_marker(marker[1], before[-1] if before else None, files)
        if complaint is not None:
            yield unit.line + prose.count("\n", 0, marker.start()), complaint
        accounted |= {one.start() for one in before[-1:]}
    if kinds or words & tests:
        return
    for figure in figures:
        if figure.start() not in accounted:
            line = unit.line + prose.count("\n", 0, figure.start())
            yield line, f"no result file is named for {figure[0]!r}; see scripts/check_docs.py"


def _check_marker(address: str, figure: re.Match[str] | None, files: Mapping[str, object]) -> str | None:
    if figure is None:
        return f"no figure stands before the marker of {address!r}"
    try:
        value = value_at(files, address)
    except ValueError as error:
        return str(error)
    return None if shows(figure[1], value) else f"{figure[0]!r} is not {value:g} of {address}"


def _check_block(block: re.Match[str], text: str, files: Mapping[str, object]) -> Iterator[tuple[int, str]]:
    """Every number with a decimal point or a unit is one of a result file of the block's name, or a row's ratio."""
    named = [data for name, data in files.items() if name.startswith(block[1])]
    held = [value for data in named for value in _numbers(data)]
    ratios = [value for data in named for value in _ratios(data)]
    inside = CODE.sub(_blank, COMMENT.sub(_blank, block[2]))
    spans = {one.start(): one[0] for one in NUMBER.finditer(inside) if "." in one[0]}
    spans |= {one.start(): one[1] for one in FIGURE.finditer(inside)}
    for start, number in sorted(spans.items()):
        if not any(shows(number, value) for value in held) and not any(shows(number, one, (1.0,)) for one in ratios):
            line = text.count("\n", 0, block.start(2) + start) + 1
            yield line, f"no file benchmarks/results/{block[1]}*.json holds {number}"


def _numbers(value: object) -> Iterator[float]:
    """Every number within a value."""
    if isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def _ratios(value: object) -> Iterator[float]:
    """Quotients of two numbers of one row."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _ratios(part)
    if isinstance(value, dict):
        numbers = [n for n in value.values() if isinstance(n, int | float) and not isinstance(n, bool) and n]
        yield from (above / below for above, below in permutations(numbers, 2))


def _blank(hit: re.Match[str]) -> str:
    """Spaces in the place of a text, lines kept."""
    return re.sub(r"[^\n]", " ", hit[0])


def main() -> int:
    """Check the workspace that holds this file, or the folder given as argument."""
    try:
        violations = check(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    except json.JSONDecodeError as error:
        print(f"a result file is no JSON: {error}")
        return 1
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
