from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ttr_controller.report import ResultsError, write_report

VOID = {"meta", "link", "img", "br", "input"}
Make = Callable[..., Path]


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, ids unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text).replace("\u00a0", " "))


def report(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def pictures_only(data: dict[str, Any]) -> dict[str, Any]:
    """The part of the results without plots, which take the time."""
    return {name: data[name] for name in ("schema", "preset", "seed", "sheet")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, finished_run: Make) -> tuple[str, Page]:
    """The page of a finished run, for the tests that change nothing."""
    return report(finished_run(tmp_path_factory.mktemp("whole")))


def test_a_whole_page(whole: tuple[str, Page]) -> None:
    text, page = whole
    titles = ["Pictures", "Fidelity of each layer", "Training the students", "What the policy chose"]
    titles += ["Quality against cost", "How the policy learnt", "Time on this machine", "Checks", "Reproduce this"]
    assert [page.words.rindex(title) for title in titles] == sorted(page.words.rindex(title) for title in titles)
    for part in (
        "toy",
        "Times are this machine's",
        "uv run ttr quickstart --preset near_far",
        "AMD EPYC 7B13",
        "2.15.0",
    ):
        assert part in page.words
    assert "3 of 4 checks passed, 1 failed." in page.words
    assert len(page.all("svg")) == 8
    assert "not reached this phase" not in page.words
    assert len(page.all("script")) == 0
    assert len(text) < 3_000_000


def test_nothing_is_loaded_from_elsewhere(whole: tuple[str, Page]) -> None:
    text, page = whole
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "poster", "data", "action"):
                assert value.startswith(("data:", "#")), value
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "://" not in text


def test_prompts_are_escaped_and_every_picture_is_embedded(data: dict[str, Any], make_run: Make) -> None:
    text, page = report(make_run(pictures_only(data)))
    for prompt in data["sheet"]["prompts"]:
        assert prompt in page.words
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; cat" in text
    images = page.all("img")
    assert len(images) == 36
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert len({image["src"] for image in images}) == 36
    assert all(image["alt"] and image["width"] == image["height"] == "16" for image in images)
    assert "a <b>bold</b> & cat: teacher, exact attention" in [image["alt"] for image in images]


def test_text_from_the_results_cannot_become_markup(data: dict[str, Any], make_run: Make) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x>"
    data["machine"]["cpu"] = data["checks"][0]["name"] = data["controller"]["method"] = data["preset"] = evil
    data["sheet"]["columns"][0]["label"] = data["fidelity"]["rows"][0]["layer"] = data["created"] = evil
    data["fidelity"]["rows"][0]["variant"] = data["timing"]["rows"][-1]["variant"] = evil
    data["pareto"]["points"][0]["method"] = data["versions"]["x"] = data["controller"]["heatmap"]["layers"][0] = evil
    _, page = report(make_run(data))
    assert not page.all("script")
    assert len(page.all("img")) == 36


def test_size_with_pictures_of_128_pixels(data: dict[str, Any], make_run: Make) -> None:
    # Noise does not compress: the largest files that 8-bit RGB pictures of this size can be.
    text, _ = report(make_run(data, side=128))
    assert 2_000_000 < len(text) < 3_000_000


def test_the_front_names_the_methods_that_were_not_run_and_why(data: dict[str, Any], make_run: Make) -> None:
    _, page = report(make_run(data))
    assert "not run" not in page.words
    why = "96 rollouts each, about 5 min on this machine"
    data["pareto"]["not_run"] = {"relaxed": why, "reinforce": why}
    _, page = report(make_run(data))
    assert "not run: relaxed, reinforce" in page.words
    assert f"({why})" in page.words


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("sheet", "no pictures have been sampled"),
        ("fidelity", "have not been compared with the teacher's attention"),
        ("distillation", "no student has been trained"),
        ("controller", "no policy has been learnt"),
        ("pareto", "the routing methods have not been compared"),
        ("timing", "nothing has been timed"),
        ("checks", "the results have not been checked"),
    ],
)
def test_a_missing_phase_is_said(data: dict[str, Any], make_run: Make, phase: str, said: str) -> None:
    kept = {name: data[name] for name in ("schema", "preset", "seed", "teacher", "sheet", phase)}
    _, page = report(make_run(kept))
    assert said not in page.words
    del kept[phase]
    _, page = report(make_run(kept))
    assert said in page.words
    assert "This run has not reached this phase" in page.words
    assert "This run has not finished." in page.words


def test_the_page_turns_with_the_data(whole: tuple[str, Page], data: dict[str, Any], make_run: Make) -> None:
    _, page = whole
    assert "The policy's latent error is no larger than the best simple baseline's" in page.words
    assert "pays on this machine from about 940 tokens on" in page.words
    assert "is worse than" not in page.words
    for point in data["pareto"]["points"]:
        if point["method"] == "policy":
            point["latent_rmse"] *= 1.6
    for row in data["timing"]["rows"]:
        if row["variant"] != "exact":
            row["step_ms"], row["attention_ms"] = row["step_ms"] * 3, row["attention_ms"] * 5
    data["timing"]["break_even"] = {}
    kept = {name: data[name] for name in ("schema", "preset", "teacher", "pareto", "timing")}
    _, page = report(make_run(kept))
    assert "The policy is worse than the best simple baseline" in page.words
    assert "worse than the best simple baseline: 0.214" in page.words
    assert "does not pay on this machine at any measured size up to 4,096 tokens" in page.words
    assert "pays on this machine" not in page.words


def test_values_that_are_not_numbers_are_not_shown(data: dict[str, Any], make_run: Make) -> None:
    for point in data["pareto"]["points"]:
        point["psnr"] = point["ssim"] = point["latent_rmse_se"] = float("nan")
    for row in data["fidelity"]["rows"]:
        row["relative_l2"] = None
    for row in data["timing"]["rows"]:
        row["attention_ms"] = float("inf")
    for point in data["controller"]["curve"]:
        point["reward"] = float("nan")
    _, page = report(make_run(data))
    assert not re.search(
        r"\b(nan|none|inf|null|undefined)\b", page.words.replace("break-even: none", ""), re.IGNORECASE
    )


def test_pictures_that_cannot_be_read_are_named(data: dict[str, Any], make_run: Make) -> None:
    run = make_run(pictures_only(data))
    (run / "images" / "2_1.png").unlink()
    broken = run / "images" / "3_2.png"
    broken.write_bytes(broken.read_bytes()[:-20])
    _, page = report(run)
    assert len(page.all("img")) == 34
    assert "picture missing: images/2_1.png" in page.words
    assert "picture broken: images/3_2.png" in page.words


def test_pictures_outside_the_run_are_refused(data: dict[str, Any], make_run: Make) -> None:
    run = make_run(pictures_only(data))
    (run.parent / "secret.png").write_bytes((run / "images" / "0_0.png").read_bytes())
    for name in ("../secret.png", str(run.parent / "secret.png")):
        data["sheet"]["columns"][0]["images"][0] = name
        (run / "results.json").write_text(json.dumps(data))
        with pytest.raises(ResultsError, match="outside the run's folder"):
            write_report(run)


def test_the_same_results_give_the_same_bytes(
    whole: tuple[str, Page], data: dict[str, Any], make_run: Make, tmp_path: Path
) -> None:
    path = write_report(make_run(data), tmp_path / "elsewhere.html")
    assert path == tmp_path / "elsewhere.html"
    assert path.read_text(encoding="utf-8") == whole[0]


def test_truncated_results_leave_the_report_alone(data: dict[str, Any], make_run: Make) -> None:
    run = make_run(pictures_only(data))
    before = write_report(run).read_bytes()
    (run / "results.json").write_text(json.dumps(data)[:-300])
    with pytest.raises(ResultsError, match="broken or cut short"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["images", "report.html", "results.json"]


def test_a_failed_write_leaves_the_report_alone(
    data: dict[str, Any], make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run({"schema": 1, "preset": "near_far"})
    before = write_report(run).read_bytes()
    (run / "results.json").write_text('{"schema": 1, "preset": "hkr"}')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob("*.tmp")) + list(run.glob(".*.tmp"))


def test_importing_the_report_does_not_load_matplotlib() -> None:
    program = "import sys, ttr_controller.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_policy_without_rollouts(data: dict[str, Any], make_run: Make) -> None:
    data["controller"] |= {"rollouts": 0, "curve": []}
    kept = {name: data[name] for name in ("schema", "preset", "teacher", "controller")}
    _, page = report(make_run(kept))
    assert "no rollouts were made, the policy is what the probe gave" in page.words


def test_fields_that_are_not_shown_are_named(make_run: Make) -> None:
    _, page = report(make_run({"schema": 1, "preset": "near_far", "surprise": 1}))
    assert "surprise" in page.words
