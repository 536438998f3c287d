"""scripts/build_paper.sh: options, errors, exit codes and the commands that it runs."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "build_paper.sh"
PAPER = ROOT / "docs" / "paper" / "ttr.tex"
FLAGS = ("-interaction=nonstopmode", "-halt-on-error", "-file-line-error")

# Where no shell of this kind is at home.
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the script is for bash")

STAND_IN = """#!/usr/bin/env bash
for argument in "$@"; do
  case "$argument" in -output-directory=*) out=${argument#*=} ;; -c) exit 0 ;; *.tex) name=${argument%.tex} ;; esac
done
echo x >>"$out/passes"
: >"$out/$name.aux"
[ "${LEAVES_NOTHING:-}" ] || : >"$out/$name.pdf"
"""


def build(
    *options: str | Path, path: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script, with nothing but the tools in ``path`` if that is given."""
    variables = {**os.environ, **(environment or {})}
    if path is not None:
        variables["PATH"] = str(path)
    command = [str(shutil.which("bash")), str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=variables)


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("+ ")) for line in output.splitlines() if line.startswith("+ ")]


def tools(folder: Path, *names: str) -> Path:
    """A folder with what the shell needs, and stand-ins that leave the files which the real programs leave."""
    folder.mkdir()
    for name in ("basename", "bash", "cat", "dirname", "env", "mkdir", "rm"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name in names:
        (folder / name).write_text(STAND_IN, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a paper.tex"
    path.write_text("\\documentclass{article}\\begin{document}x\\end{document}\n", encoding="utf-8")
    return path


def test_the_paper_dry(tmp_path: Path) -> None:
    """What CI runs: the paper's own source, no tool needed, nothing written."""
    options = ("--dry-run", "--clean", "--engine", "latexmk", "--outdir", tmp_path / "out")
    run = build(*options, path=tools(tmp_path / "bin"))
    assert (run.returncode, run.stderr) == (0, "")
    out = f"-output-directory={tmp_path / 'out'}"
    assert commands(run.stdout) == [
        ["mkdir", "-p", str(tmp_path / "out")],
        ["cd", str(PAPER.parent)],
        ["latexmk", "-pdf", *FLAGS, out, "ttr.tex"],
        ["latexmk", "-c", out, "ttr.tex"],
    ]
    assert all(line.startswith("+ ") for line in run.stdout.splitlines())
    assert not (tmp_path / "out").exists()


def test_pdflatex_runs_twice_and_cleans_by_name(source: Path, tmp_path: Path) -> None:
    run = build("--tex", source, "--outdir", tmp_path / "o", "--engine", "pdflatex", "--clean", "--dry-run")
    found = commands(run.stdout)
    assert [line[0] for line in found] == ["mkdir", "cd", "pdflatex", "pdflatex", *["rm"] * 6]
    assert found[2] == ["pdflatex", *FLAGS, f"-output-directory={tmp_path / 'o'}", "a paper.tex"]
    removed = [Path(line[2]).suffix for line in found[4:]]
    assert removed == [".aux", ".fdb_latexmk", ".fls", ".log", ".out", ".toc"]


@pytest.mark.parametrize(("installed", "chosen"), [(("latexmk", "pdflatex"), "latexmk"), (("pdflatex",), "pdflatex")])
def test_auto_takes_latexmk_where_it_is(installed: tuple[str, ...], chosen: str, tmp_path: Path) -> None:
    run = build("--dry-run", path=tools(tmp_path / "bin", *installed))
    assert commands(run.stdout)[2][0] == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fast",), "unknown option: --fast"),
        (("paper.tex",), "unknown option: paper.tex"),
        (("--tex",), "option --tex needs a value"),
        (("--outdir", "--dry-run"), "option --outdir needs a value"),
        (("--engine", ""), "option --engine needs a value"),
        (("--engine", "xelatex"), "unknown engine: xelatex"),
        (("--dry-run", "--tex", "nowhere.tex"), "no such file: nowhere.tex"),
    ],
)
def test_errors(options: tuple[str, ...], message: str) -> None:
    run = build(*options)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"error: {message}")
    assert run.stderr.count("\n") == 1


def test_help_names_every_option() -> None:
    assert build("--help").stdout == build("-h").stdout
    script = SCRIPT.read_text(encoding="utf-8")
    options = set(re.findall(r"^ +(--[a-z-]+)\)", script, re.MULTILINE))
    assert options == {"--tex", "--outdir", "--engine", "--clean", "--dry-run"}
    assert all(option in build("--help").stdout for option in options)


@pytest.mark.parametrize(("engine", "passes"), [("latexmk", 1), ("pdflatex", 2)])
def test_it_says_what_it_built(engine: str, passes: int, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--tex", source, "--outdir", out, "--engine", engine, "--clean")
    run = build(*options, path=tools(tmp_path / "bin", engine))
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, f"Built {out / 'a paper.pdf'}")
    assert (out / "passes").read_text().count("x") == passes
    assert (out / "a paper.aux").exists() is (engine == "latexmk")  # the stand-in for latexmk -c removes nothing


def test_a_build_without_a_pdf_fails(source: Path, tmp_path: Path) -> None:
    options = ("--tex", source, "--outdir", tmp_path / "out", "--engine", "latexmk")
    run = build(*options, path=tools(tmp_path / "bin", "latexmk"), environment={"LEAVES_NOTHING": "1"})
    assert run.returncode == 1
    assert "Built" not in run.stdout
    assert run.stderr.startswith("error: latexmk ended without an error and left no ")


def test_a_missing_tool_is_named(source: Path, tmp_path: Path) -> None:
    run = build("--tex", source, "--engine", "pdflatex", path=tools(tmp_path / "bin"))
    assert (run.returncode, run.stderr[:35]) == (1, "error: pdflatex is not installed (D")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
def test_the_paper_builds(tmp_path: Path) -> None:
    run = build("--outdir", tmp_path / "out", "--engine", "pdflatex")
    assert run.returncode == 0, run.stdout[-2000:]
    assert (tmp_path / "out" / "ttr.pdf").stat().st_size > 50_000
