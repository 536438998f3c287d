import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ttr_controller.report import ResultsError, load_results


def broken(folder: Path, text: str | bytes) -> str:
    """Write a results file and return the one line that reading it gives."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ResultsError) as caught:
        load_results(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_whole_run_is_read(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    results = load_results(make_run(data))
    assert results.fidelity is not None
    assert results.pareto is not None
    assert results.timing is not None
    assert results.fidelity.rows[2].ready is True
    assert results.pareto.points[0].method == "all student"
    assert results.timing.break_even["near_far"].step_tokens == 940.0
    assert results.checks[3].value is True
    assert results.seconds["timing"] == 15.0
    assert results.unread == ()


def test_only_the_schema_and_the_preset_are_needed(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1, "preset": "near_far"}')
    results = load_results(tmp_path)
    assert results.pareto is results.sheet is results.timing is None
    assert not results.complete


def test_what_is_not_a_number_reads_as_not_measured(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    data["pareto"]["points"][0]["psnr"] = float("nan")
    data["pareto"]["points"][1]["psnr"] = float("-inf")
    data["seconds"]["total"] = None
    results = load_results(make_run(data))
    assert results.pareto is not None
    assert [point.psnr for point in results.pareto.points[:2]] == [None, None]
    assert results.seconds["total"] is None


def test_a_number_too_large_for_a_float_reads_as_not_measured(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1, "preset": "hkr", "budget_minutes": 1e999}')
    assert load_results(tmp_path).budget_minutes is None


def test_fields_that_are_not_read_are_named(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    data["surprise"] = 1
    data["pareto"]["points"][3]["colour"] = "red"
    assert load_results(make_run(data)).unread == ("pareto.points[3].colour", "surprise")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no results\.json in .*nowhere"):
        load_results(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 200, 5000])
def test_a_truncated_file(data: dict[str, Any], tmp_path: Path, keep: int) -> None:
    assert "broken or cut short" in broken(tmp_path, json.dumps(data)[:keep])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"\xff\xfe\x00", "not a text file"),
        ("[1, 2]", "must hold a JSON object"),
        ('{"preset": "hkr"}', "has schema None"),
        ('{"schema": 2, "preset": "hkr"}', "has schema 2"),
        ('{"schema": 1}', "preset is missing"),
        ("[" * 100_000, "broken or cut short"),
        ('{"schema": 1, "preset": 3}', "preset must be a text, got 3"),
        ('{"schema": 1, "preset": "hkr", "complete": "yes"}', 'complete must be true or false, got "yes"'),
        ('{"schema": 1, "preset": "hkr", "seed": 1.5}', "seed must be a whole number, got 1.5"),
        ('{"schema": 1, "preset": "hkr", "seed": true}', "seed must be a whole number, got true"),
        ('{"schema": 1, "preset": "hkr", "seconds": []}', "seconds must be an object"),
        ('{"schema": 1, "preset": "hkr", "checks": {}}', "checks must be a list"),
        ('{"schema": 1, "preset": "hkr", "pareto": {"points": [{"method": "policy"}]}}', "points[0].cost is missing"),
        ('{"schema": 1, "preset": "hkr", "pareto": {"points": [{"method": "a", "cost": NaN}]}}', "got null"),
    ],
)
def test_wrong_contents_say_where_and_what(tmp_path: Path, text: str | bytes, part: str) -> None:
    assert part in broken(tmp_path, text)


def test_lists_that_do_not_match(data: dict[str, Any], tmp_path: Path) -> None:
    bad = json.loads(json.dumps(data))
    bad["sheet"]["columns"][2]["images"].pop()
    assert "has 5 images for 6 prompts" in broken(tmp_path, json.dumps(bad))
    bad = json.loads(json.dumps(data))
    bad["controller"]["heatmap"]["full_probability"][3].pop()
    assert "full_probability[3] has 5 values for 6 layers" in broken(tmp_path, json.dumps(bad))
    bad = json.loads(json.dumps(data))
    bad["controller"]["heatmap"]["full_probability"][3][0] = 1.2
    assert "outside 0..1" in broken(tmp_path, json.dumps(bad))
    bad = json.loads(json.dumps(data))
    bad["distillation"]["curves"][1]["loss"].append(1.0)
    assert "distillation.curves[1]: loss has 32 values for 31 updates" in broken(tmp_path, json.dumps(bad))
    bad = json.loads(json.dumps(data))
    bad["fidelity"]["rows"][0]["when"] = "during"
    assert "'during'" in broken(tmp_path, json.dumps(bad))
