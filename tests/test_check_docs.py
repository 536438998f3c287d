"""A measured figure that no result file holds is found, and one that a file holds is not."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from check_docs import check, check_text, known_tests, shows, units, value_at
from write_benchmarks import PAGE, page

FILES: Mapping[str, object] = {
    "speed.json": {
        "facts": {"device": "a CPU"},
        "rows": [
            {"scene": "block, 1K", "method": "exact", "milliseconds": 12.345, "share": 0.198},
            {"scene": "block, 1K", "method": "near-far", "milliseconds": 3.2, "share": 0.05},
        ],
        "named": {"Flux: [B, H, N, D]": {"overhead_us": 10.146}},
    },
    "students-cpu.json": {"rows": [{"cosine": 0.0123, "seconds": 4.56, "bytes": 3145728}]},
}
TESTS = frozenset({"test_speed", "test_check_docs.py"})
EXACT = "speed.json#rows[scene=block, 1K;method=exact]"


def complaints(text: str) -> list[str]:
    return [what for _, what in check_text(text, FILES, TESTS)]


@pytest.mark.parametrize(
    "text",
    ["It is 3.8x faster.", "In 12 ms.", "40 % of it", "about 4 times as fast", "1,024 MiB more", "2.5\u00d7", "9.9 us"],
)
def test_a_figure_without_a_result_is_found(text: str) -> None:
    assert len(complaints(text)) == 1
    assert "no result file is named" in complaints(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        "An image of 64 x 64 tokens, version 0.42.1, 24 heads of 128.",
        "```\n3.8x\n```\n",
        "The option `12 ms` and <!-- 3.8x --> a comment.",
        "Below 2K images.",
    ],
)
def test_what_is_no_figure_is_left_alone(text: str) -> None:
    assert complaints(text) == []


def test_a_marker_accounts_for_the_figure_before_it_alone() -> None:
    assert complaints(f"It takes 12.3 ms <!-- from: {EXACT}.milliseconds --> here.") == []
    assert complaints(f"Attention is 19.8 % <!-- from: {EXACT}.share --> of it.") == []
    wrong = complaints(f"It takes 12.4 ms <!-- from: {EXACT}.milliseconds --> here.")
    assert wrong == [f"'12.4 ms' is not 12.345 of {EXACT}.milliseconds"]
    two = complaints(f"From 3 ms to 12.3 ms <!-- from: {EXACT}.milliseconds --> here.")
    assert len(two) == 1
    assert "'3 ms'" in two[0]
    assert "no figure stands before" in complaints(f"<!-- from: {EXACT}.share --> 19.8 %")[0]


def test_what_a_marker_names_must_exist() -> None:
    assert "no result file 'slow.json'" in complaints("3 ms <!-- from: slow.json#rows -->")[0]
    assert "has no 'speed'" in complaints("3 ms <!-- from: speed.json#speed -->")[0]
    assert "2 items with scene=block, 1K" in complaints("3 ms <!-- from: speed.json#rows[scene=block, 1K].share -->")[0]
    assert "is no number" in complaints("3 ms <!-- from: speed.json#facts.device -->")[0]


def test_a_name_with_other_characters_is_quoted() -> None:
    address = 'speed.json#named."Flux: [B, H, N, D]".overhead_us'
    assert value_at(FILES, address) == 10.146
    assert complaints(f"It costs 10.1 us <!-- from: {address} --> a call.") == []


def test_a_test_that_exists_holds_the_figures_of_its_paragraph() -> None:
    assert complaints("At most 12 ms (`test_speed`).") == []
    assert complaints("- At most 12 ms (`test_speed`).\n- At most 13 ms.") == [
        "no result file is named for '13 ms'; see scripts/check_docs.py"
    ]
    assert len(complaints("At most 12 ms (`test_of_nothing`).")) == 1


def test_a_reason_to_have_no_result_is_one_of_few() -> None:
    assert complaints("About 5 GB <!-- no result: size --> on disk.") == []
    found = complaints("It is 9x faster <!-- no result: trust me -->, 3x <!-- no result: guess -->.")
    assert any("'guess' is no reason" in what for what in found)


def test_generated_blocks_of_other_scripts_hold_only_numbers_of_their_files() -> None:
    text = "<!-- students: begin -->\n| hkr | 0.012 | {} s | 3 MiB |\n<!-- students: end -->\n"
    assert complaints(text.format("4.6")) == []
    found = list(check_text(text.format("4.7"), FILES, TESTS))
    assert found == [(2, "no file benchmarks/results/students*.json holds 4.7")]


def test_a_ratio_of_two_numbers_of_one_row_is_held() -> None:
    # 4.56 / 0.0123; but not that ratio in percent.
    assert complaints("<!-- students: begin -->\n| 370.7 |\n<!-- students: end -->") == []
    assert len(complaints("<!-- students: begin -->\n| 37073.2 |\n<!-- students: end -->")) == 1


def test_rounding_is_that_of_the_digits_shown() -> None:
    assert shows("12.3", 12.345)
    assert not shows("12.30", 12.345)
    assert shows("1,024", 1024.4)
    assert shows("20", 0.198)
    assert not shows("21", 0.198)


def test_lines_are_those_of_the_document() -> None:
    text = "one\ntwo\n\n- three\n  four\n- five\n| a |\n| b |\n"
    assert [(unit.line, unit.text.count("\n")) for unit in units(text)] == [(1, 1), (4, 1), (6, 0), (7, 0), (8, 0)]
    assert [line for line, _ in check_text("one\ntwo 3 ms\n\nfour\n5 ms", FILES, TESTS)] == [2, 5]


def test_a_workspace_is_checked_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "packages" / "one").mkdir(parents=True)
    (tmp_path / PAGE).write_text(page([]), encoding="utf-8")
    assert check(tmp_path) == []
    (tmp_path / "packages" / "one" / "README.md").write_text("\nIt is 3x faster.\n", encoding="utf-8")
    (tmp_path / PAGE).write_text(page([]) + "It is fast.\n", encoding="utf-8")
    assert [str(one).partition(": ")[0] for one in check(tmp_path)] == [f"{PAGE}:1", "packages/one/README.md:2"]


def test_the_tests_of_this_workspace_are_known() -> None:
    names = known_tests(Path(__file__).parents[1])
    assert {"test_the_tests_of_this_workspace_are_known", "test_check_docs.py", "test_partial"} <= names
