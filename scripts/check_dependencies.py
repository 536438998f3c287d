"""Check what the packages bring along: few default dependencies, each with a reason, under licences that permit use.

    uv run python scripts/check_dependencies.py

Prints the default dependencies with the reason for each and the licence of every distribution that an ordinary
installation of all packages brings. Ends with 1 if a dependency has no reason here, a reason no dependency, or a
licence is unknown or not among ``PERMISSIVE``.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import MappingProxyType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "jinja2": "writes the report page, with every text escaped",
        "markupsafe": "marks what of the page is markup; jinja2 brings it too",
        "matplotlib": "draws the figures of the report",
        "numpy": "torch turns tensors to arrays with it, and Triton's interpreter needs it",
        "pillow": "reads and writes pictures",
        "rich": "progress bars and tables of the command line",
        "safetensors": "checkpoints that are data and run no code",
        "torch": "tensors",
        "triton": "the fast kernels, where it runs",
        "triton-windows": "the same for Windows",
        "typer": "the command line",
    }
)
"""Why every user of a package gets this."""

PERMISSIVE = ("apache", "bsd", "mit", "isc", "psf", "python software foundation", "mpl", "mozilla public", "unlicense",
              "zlib", "hpnd", "historical permission", "cnri", "0bsd", "public domain", "cc0")  # fmt: skip
"""Words of licences that permit use, change and distribution; those of Mozilla for their own files."""

KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "nvidia": "NVIDIA's licence of the CUDA libraries that torch's builds for Linux link to; not ours to pass on",
        "cuda": "as above",
    }
)
"""Distributions, by the start of their name, with a licence of their own kind."""


def projects() -> dict[str, dict[str, object]]:
    """The ``[project]`` table of each package of the workspace."""
    files = sorted(ROOT.glob("packages/*/pyproject.toml"))
    tables = [tomllib.loads(file.read_text(encoding="utf-8"))["project"] for file in files]
    return {str(table["name"]): table for table in tables}


def default_dependencies(tables: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """What a package requires without any extra and of others, each with the packages that require it."""
    found: dict[str, list[str]] = {}
    for package, table in tables.items():
        listed = table.get("dependencies", [])
        assert isinstance(listed, list)
        for name in sorted({canonicalize_name(Requirement(one).name) for one in listed} - set(tables)):
            found.setdefault(name, []).append(package)
    return dict(sorted(found.items()))


def reason_faults(found: Mapping[str, list[str]], reasons: Mapping[str, str]) -> list[str]:
    """Dependencies without a reason, and reasons without a dependency."""
    faults = [f"{name}, required by {', '.join(found[name])}, has no reason" for name in found if name not in reasons]
    return faults + [f"{name} has a reason and nobody requires it" for name in reasons if name not in found]


def closure(names: Iterator[str] | list[str]) -> list[str]:
    """Every distribution that these bring in this environment, themselves included."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        try:
            required = metadata(name).get_all("Requires-Dist") or []
        except PackageNotFoundError:
            continue
        seen.add(name)
        parsed = [Requirement(one) for one in required]
        waiting += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return sorted(seen)


def licence_of(name: str) -> str:
    """What a distribution says of its licence: an expression, classifiers, or the first line of a text."""
    facts = metadata(name)
    classifiers = [one.rpartition(" :: ")[2] for one in facts.get_all("Classifier") or [] if one.startswith("License")]
    said = facts.get("License-Expression") or ", ".join(one for one in classifiers if one != "OSI Approved")
    return said or (facts.get("License") or "").strip().split("\n")[0]


def licence_fault(name: str, licence: str) -> str | None:
    """Why a licence will not do, or ``None``."""
    if any(name.startswith(start) for start in KNOWN):
        return None
    text = licence.lower()
    if re.search(r"\ba?gpl|affero|general public", text) and not re.search(r"lgpl|lesser| or ", text):
        return f"{name} is under {licence}, which asks the same of what uses it"
    if not any(re.search(rf"\b{word}", text) for word in PERMISSIVE):
        return f"{name} is under {licence!r}, which is not known to permit use"
    return None


def main() -> int:
    """Print the tables and the faults."""
    tables = projects()
    found = default_dependencies(tables)
    print("| default dependency | of | why |\n|---|---|---|")
    for name, packages in found.items():
        print(f"| {name} | {', '.join(packages)} | {REASONS.get(name, '')} |")
    faults = reason_faults(found, REASONS)
    brought = [name for name in closure(list(found)) if name not in tables]
    print("\n| brought along | licence |\n|---|---|")
    for name in brought:
        licence = licence_of(name)
        print(f"| {name} | {licence} |")
        fault = licence_fault(name, licence)
        faults += [] if fault is None else [fault]
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
