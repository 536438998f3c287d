"""The paper's tables and numbers are what the result files say, and the paper names nothing that is not there."""

import json
import math
import re
from pathlib import Path

import make_figures
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPER = (ROOT / "docs" / "paper" / "ttr.tex").read_text(encoding="utf-8")
BODY = re.sub(r"(?<!\\)%.*", "", PAPER[PAPER.index(r"\begin{document}") : PAPER.index(r"\begin{thebibliography}")])

# Not measured: derived in the text, or a setting that it states.
STATED = frozenset({"0.12", "0.49", "0.005", "2.3"})


def test_what_was_generated_is_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_figures.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_result_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in make_figures.RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.stem == "operator-fidelity":
            content["rows"][0]["cosine_distance"] *= 1.5
        (tmp_path / path.name).write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(make_figures, "RESULTS", tmp_path)
    assert make_figures.main(["--check"]) == 1
    assert "operators.tex is not what the results say" in capsys.readouterr().err


def test_every_decimal_of_the_text_comes_from_a_result() -> None:
    """Numbers are commands that ``numbers.tex`` defines; what the text states itself is listed here."""
    prose = re.sub(
        r"\\(begin|end|includegraphics|vspace|documentclass|usepackage)\S*(\[[^]]*\])?(\{[^}]*\})*", "", BODY
    )
    prose = re.sub(r"\[width=[^]]*\]", "", prose)
    assert set(re.findall(r"\d+\.\d+", prose)) <= STATED


def test_every_command_label_and_reference_is_there() -> None:
    defined = set(re.findall(r"\\newcommand\{\\(\w+)\}", (make_figures.GENERATED / "numbers.tex").read_text()))
    used = {name for name in defined if re.search(rf"\\{name}\b", BODY)}
    assert len(used) > 15
    assert defined == used, "numbers that the text does not use"
    cited = {key for group in re.findall(r"\\cite[pt]\{([^}]*)\}", BODY) for key in group.split(",")}
    listed = set(re.findall(r"\\bibitem\[[^]]*\]\{(\w+)\}", PAPER))
    assert cited == listed
    assert set(re.findall(r"\\ref\{([^}]*)\}", BODY)) <= set(re.findall(r"\\label\{([^}]*)\}", BODY))
    for name in re.findall(r"\\includegraphics\[[^]]*\]\{([^}]*)\}", BODY):
        conditional = rf"\IfFileExists{{{name}.tex}}" in BODY
        assert conditional or (ROOT / "docs" / "paper" / f"{name}.pdf").is_file()


def test_numbers_keep_the_digits_that_count() -> None:
    values = (0.00123, 0.1, 1.249, 9.84, 113.9, 0.0, math.nan)
    assert [make_figures.short(value) for value in values] == ["0.0012", "0.10", "1.2", "9.8", "114", "0", "--"]


def test_routing_is_summed_up_over_seeds() -> None:
    rows = [
        [{"method": "flips", "level": 0.5, "errors": [0.1, 0.3]}, {"method": "random", "level": 0.5, "errors": [0.5]}],
        [{"method": "flips", "level": 0.5, "errors": [0.4]}, {"method": "random", "level": 0.5, "errors": [0.7]}],
    ]
    entry = {"seeds": {str(seed): {"rows": own} for seed, own in enumerate(rows)}}
    found = make_figures.errors_of(entry)
    assert found["flips", 0.5] == pytest.approx([0.2, 0.4])
    assert make_figures.spread([0.2, 0.4]) == pytest.approx((0.3, 0.1))
    text = make_figures.controller_table({"students": {"near_far": entry}})
    assert r"near\_far & flips & 0.3000 $\pm$ 0.1000 \\" in text


def test_students_stand_beside_their_cost() -> None:
    row = {"student": "hkr", "tokens": 256, "cosine_distance": 0.0312, "flops_share": 0.9}
    text = make_figures.student_table({"rows": [row, {**row, "student": "near_far", "tokens": 1024}]})
    assert r"hkr & 0.031 & 0.90 & -- & -- \\" in text
    assert r"near\_far & -- & -- & 0.031 & 0.90 \\" in text
