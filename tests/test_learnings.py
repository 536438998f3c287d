"""Every learning names a test that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "learnings.md").read_text(encoding="utf-8")
TESTS = tuple(path for folder in ("packages", "tests") for path in (ROOT / folder).rglob("test_*.py"))


def missing(text: str) -> list[str]:
    """Tests named in a text that no file holds."""
    found = []
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        holders = [path for path in TESTS if f"/{path.relative_to(ROOT).as_posix()}".endswith(f"/{file}")]
        if not any(re.search(rf"^ *def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE) for path in holders):
            found.append(f"{file}::{name}")
    return found


def entries(text: str) -> list[str]:
    """The entries of the lists, each as one line."""
    parts = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
    return [" ".join(part.split("\n\n")[0].split()) for part in parts]


def test_every_named_test_exists() -> None:
    assert missing(TEXT) == []


def test_every_entry_names_one() -> None:
    found = entries(TEXT)
    assert len(found) > 50
    assert [one for one in found if not re.search(r"`[\w/]+\.py::test_\w+`$", one)] == []


def test_a_name_that_is_gone_is_found() -> None:
    assert missing("- A. `test_learnings.py::test_of_yesterday`") == ["test_learnings.py::test_of_yesterday"]
    assert missing("- A. `test_learnings.py::test_every_entry_names_one`") == []
