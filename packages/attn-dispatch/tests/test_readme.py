"""Every Python block of the README runs, and prints what stands behind its prints."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from attn_dispatch import default

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)


@pytest.fixture
def choice() -> Iterator[None]:
    """Restore the attention of the process."""
    process = default._choice.get()
    before = process.selection
    yield
    process.selection = before


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 5
    assert sum(block.count("print(") for block in BLOCKS) >= 10


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.usefixtures("choice")
def test_an_example_runs_and_prints_what_it_says(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines() == PRINTED.findall(block)
