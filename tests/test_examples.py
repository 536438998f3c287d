"""The examples run as they are written, within half a minute of processor time, and show what their texts say."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("01_taylor_vs_softmax", "02_route_a_tiny_dit", "03_distill_and_serve")
SECONDS = 30


@cache
def output(name: str) -> str:
    """What the example prints; it may read and write nothing here, and starts anywhere."""
    # Limits the processor time, which a busy machine does not stretch, and leaves no doubt with the exit status.
    limited = (
        "import resource, runpy, sys;"
        f"resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        if os.name == "posix"
        else "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, str(ROOT / "examples" / f"{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert run.stderr == ""
    return run.stdout


def errors(line: str) -> list[float]:
    """Percentages of a table's line, with infinity where a query has no answer."""
    cells = re.findall(r"([\d.e+]+) %(?! none)( \(\d+% none\))?", line)
    return [float("inf") if none else float(number) for number, none in cells]


def line(text: str, start: str) -> str:
    (found,) = (one for one in text.splitlines() if one.startswith(start))
    return found


def test_these_are_all() -> None:
    assert tuple(sorted(path.stem for path in (ROOT / "examples").glob("*.py"))) == EXAMPLES


def test_taylor_holds_where_scores_are_flat_and_fails_where_they_are_not() -> None:
    text = output(EXAMPLES[0])
    three, five = errors(line(text, "P = 3  ")), errors(line(text, "P = 5  "))
    assert three == sorted(three)
    assert five == sorted(five)
    assert five[0] < 0.25 * three[0]
    assert five[-1] > 50
    # Centring is the largest single gain, and only an even number of terms leaves queries without an answer.
    assert three[0] < 0.5 * errors(line(text, "P = 3, not centred"))[0]
    assert "none)" in line(text, "P = 4, not centred")
    assert "none)" not in line(text, "P = 3, not centred")


def test_neighbours_under_one_denominator_beat_either_part_alone() -> None:
    text = output(EXAMPLES[0])
    (both,) = errors(line(text, "both, one denominator"))
    assert both < 0.7 * errors(line(text, "Taylor, P = 3"))[0]
    assert both < 0.7 * errors(line(text, "window of 7 x 7 alone"))[0]
    assert errors(line(text, "near-far"))[0] < both


def test_the_router_counts_who_answered_and_why_others_did_not() -> None:
    text = output(EXAMPLES[1])
    assert "Who answered: {'native': 8, 'near_far': 12}" in text
    assert re.search(r"^ +5 x sigma 1 is not below 0.9$", text, re.MULTILINE)
    assert re.search(r"^ +3 x the last layer is always exact$", text, re.MULTILINE)
    rows = re.findall(r"^(\w+:\d) +([\d.]+)  ([\d.]+)$", text, re.MULTILINE)
    assert len(rows) == 20
    for layer, sigma, error in rows:
        routed = float(sigma) < 0.9 and layer != "single:2"
        assert (float(error) > 0) is routed, (layer, sigma, error)
        assert float(error) < 0.2
    assert 0 < float(text.rsplit(":", 1)[1]) < 0.1


@pytest.mark.slow
def test_students_are_distilled_saved_loaded_and_serve(tmp_path: Path) -> None:
    text = output(EXAMPLES[2])
    rows = re.findall(r"^(\w+:\d) +([\d.]+|nan)  (\w+)$", text, re.MULTILINE)
    assert len(rows) == 6
    ready = sum(level == "ready" for _, _, level in rows)
    assert ready >= 4
    counts = line(text, "'")
    assert f"'student': {8 * ready}" in counts
    assert float(line(text, "PSNR").split(":")[1].split()[0]) > 20
