"""The page of benchmarks is generated from the result files and from nothing else."""

import json
from pathlib import Path

import pytest
from benchmark_tables import BLOCKS, NOTHING, Result, figure, others, results, share, table, times
from write_benchmarks import PAGE, block, documents, page, renewed, stale

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    row = {"method": "near-far", "image_tokens": 1024, "cosine_distance": 0.00203, "relative_l2": 0.054}
    write(tmp_path, "forward-cpu.json", {"facts": {"device": "a CPU"}, "fidelity": [row]})
    return tmp_path


def write(root: Path, name: str, data: object) -> None:
    (root / "benchmarks" / "results" / name).write_text(json.dumps(data), encoding="utf-8")


def found(root: Path) -> list[Result]:
    return results(root / "benchmarks" / "results")


def test_a_figure_of_a_result_file_is_on_the_page_and_follows_it(workspace: Path) -> None:
    assert "| near-far | 1,024 | 0.00203 | 0.054 |" in page(found(workspace))
    row = {"method": "near-far", "image_tokens": 1024, "cosine_distance": 0.5, "relative_l2": 0.9}
    write(workspace, "forward-cpu.json", {"fidelity": [row]})
    assert "| near-far | 1,024 | 0.5 | 0.9 |" in page(found(workspace))


def test_without_results_nothing_is_measured(tmp_path: Path) -> None:
    text = page(results(tmp_path))
    assert f"On a GPU: {NOTHING}." in text
    assert "| " not in text


def test_every_block_is_on_the_page_once() -> None:
    text = page([])
    assert [text.count(f"<!-- figures: {name} -->") for name in BLOCKS] == [1] * len(BLOCKS)


def test_a_page_that_was_changed_by_hand_is_stale_and_is_made_anew(workspace: Path) -> None:
    path = workspace / PAGE
    assert set(stale(workspace, found(workspace))) == {path}
    path.write_text(page(found(workspace)), encoding="utf-8")
    assert not stale(workspace, found(workspace))
    path.write_text(path.read_text(encoding="utf-8").replace("0.00203", "0.00103"), encoding="utf-8")
    assert stale(workspace, found(workspace)) == {path: page(found(workspace))}


def test_blocks_of_other_documents_are_generated_and_the_rest_of_them_stays(workspace: Path) -> None:
    text = "before\n<!-- figures: gpu -->\nOn a GPU: very fast.\n<!-- end of figures -->\nafter\n"
    (workspace / "README.md").write_text(text, encoding="utf-8")
    new = stale(workspace, found(workspace))[workspace / "README.md"]
    assert new == f"before\n{block('gpu', found(workspace))}\nafter\n"
    assert renewed(new, found(workspace)) == new


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no block 'speed'"):
        renewed("<!-- figures: speed -->\n<!-- end of figures -->", [])


def test_the_changelog_is_no_statement_of_results(workspace: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "docs/learnings.md"):
        (workspace / name).write_text("", encoding="utf-8")
    assert {path.name for path in documents(workspace)} == {"README.md", "learnings.md"}


def test_numbers_as_they_are_written() -> None:
    assert [figure(value) for value in (0.0020312, 12.34, 4608, 1049088.0, None, "text")] == [
        "0.00203", "12.3", "4,608", "1,049,088", NOTHING, "text",
    ]  # fmt: skip
    assert (times(1.5999), times(None), share(0.19777)) == ("1.60x", NOTHING, "19.8 %")
    assert table(("a", "b"), [("c", "1")]) == "| a | b |\n| --- | --: |\n| c | 1 |"


def test_files_of_other_scripts_stand_as_they_are() -> None:
    rows = {"facts": {"device": "one"}, "rows": [{"what": "update", "milliseconds": 103.4, "curve": [1, 2]}]}
    named = {"cpus": 2, "rows": {"SDPA": {"overhead_us": 2.5}}}
    text = others([Result("students.json", rows), Result("dispatch.json", named)])
    assert "students.json: device one.\n\n| what | milliseconds |\n| --- | --: |\n| update | 103 |" in text
    assert "dispatch.json: cpus 2.\n\n|  | overhead us |\n| --- | --: |\n| SDPA | 2.5 |" in text


def test_the_results_of_this_workspace_make_a_page() -> None:
    text = page(results())
    assert "full-width block, 1K" in text
    assert "taylor 4, width 16" in text
    assert "**Modelled, not measured.**" in text
    assert "1,049,088" in text
