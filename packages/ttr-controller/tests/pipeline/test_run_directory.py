import json
from pathlib import Path

import pytest
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import QuickstartSettings, RunError

SETTINGS = QuickstartSettings()


def test_a_new_run_is_found_again_with_its_settings_and_sections(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path / "run", QuickstartSettings(preset="hkr", seed=7))
    run.record("timing", {"rows": [1, 2]}, 1.25)
    again = RunDirectory.open(tmp_path / "run")
    assert again.settings == QuickstartSettings(preset="hkr", seed=7)
    assert again.section("timing") == {"rows": [1, 2]}
    assert again.results["seconds"] == {"timing": 1.25, "total": 1.25}
    assert not again.complete


def test_seconds_of_a_resumed_phase_add_up(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, SETTINGS)
    run.add_seconds("preparation", 1.0)
    run.add_seconds("preparation", 2.0)
    run.record("timing", {}, 4.0)
    assert run.results["seconds"] == {"preparation": 3.0, "timing": 4.0, "total": 7.0}


def test_other_settings_are_refused_by_name_but_another_budget_is_not(tmp_path: Path) -> None:
    RunDirectory.open_or_create(tmp_path, SETTINGS)
    RunDirectory.open_or_create(tmp_path, QuickstartSettings(budget_minutes=1.0))
    with pytest.raises(RunError, match=r"preset: near_far here, hkr|preset: hkr here, near_far in the run"):
        RunDirectory.open_or_create(tmp_path, QuickstartSettings(preset="hkr"))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="not empty"):
        RunDirectory.open_or_create(tmp_path, SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_path_through_a_file_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot write to .*choose another --out"):
        RunDirectory.open_or_create(tmp_path / "file" / below / "run", SETTINGS)


def test_a_run_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run in"):
        RunDirectory.open(tmp_path)
    run = RunDirectory.open_or_create(tmp_path, SETTINGS)
    with pytest.raises(RunError, match="no pareto yet"):
        run.section("pareto")
    whole = (tmp_path / "results.json").read_text()
    for text in (whole[: len(whole) // 2], "[]", json.dumps({"schema": 1}), ""):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(RunError, match="damaged"):
            RunDirectory.open(tmp_path)
    (tmp_path / "results.json").write_text(whole.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(RunError, match="schema 99"):
        RunDirectory.open(tmp_path)


def test_results_never_hold_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="JSON compliant"):
        run.record("timing", {"ms": float("nan")})
    assert "timing" not in RunDirectory.open(tmp_path).results
