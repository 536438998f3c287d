"""The example workflows in a real ComfyUI, as its page queues them, with a tiny model in place of the downloads."""

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.enable_socket]

FOLDER = Path(__file__).resolve().parents[1] / "src/comfy_nodes/example_workflows"
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "house", "boat", "fox", "kite")]
TINY = {"UNETLoader": 0, "EmptyFlux2LatentImage": 3, "VAELoader": 4}
"""Which output of the tiny model stands in for a node that needs downloads."""

Flow = dict[str, Any]
"""What a page queues: node id to ``class_type`` and ``inputs``."""


def _page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page", Path(__file__).with_name("page.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _by_hand(saved: Mapping[str, Any]) -> Flow:
    """What the page should make of a saved workflow: the numbers of its widgets, and its links."""
    sources = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    made: Flow = {}
    for node in saved["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs = {name: value for name, value in node.get("widgets_values_named", {}).items() if value is not None}
        linked = {item["name"]: sources[item["link"]] for item in node.get("inputs", ()) if item["link"] is not None}
        made[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return made


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """The example workflows as they are saved."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.json")}


@pytest.fixture(scope="module")
def converted(comfyui: Any, saved: dict[str, Any]) -> dict[str, Flow] | None:
    """What ComfyUI's page makes of them; ``None`` where there is no Chromium to show it."""
    if comfyui.newest != "flux2":
        pytest.skip("this ComfyUI has no Flux2, and so not the nodes of the examples")
    page = _page()
    found: dict[str, Flow] | None = page.convert(comfyui.port, saved) if page.find_browser() else None
    return found


@pytest.fixture(scope="module")
def examples(saved: dict[str, Any], converted: dict[str, Flow] | None) -> dict[str, Flow]:
    """What the Run button would queue: from the page, or read from the files where none can be shown."""
    if converted is None:
        warnings.warn("no Chromium: the examples are converted without the page", stacklevel=1)
    return converted or {name: _by_hand(flow) for name, flow in saved.items()}


def _tiny(flow: Flow, size: int, **changes: Any) -> dict[str, Any]:
    """Put a tiny model in place of what needs downloads, and other values where a run would be long."""
    made: dict[str, Any] = {"tiny": ("TestFlux", {"variant": "flux2", "size": size})}
    for key, node in flow.items():
        kind = node["class_type"]
        if kind in TINY or kind == "CLIPLoader":
            continue
        inputs = {}
        for name, value in node["inputs"].items():
            source = flow.get(value[0]) if isinstance(value, list) else None
            stand_in = None if source is None else TINY.get(source["class_type"])
            inputs[name] = value if stand_in is None else ["tiny", stand_in]
        if kind == "CLIPTextEncode":
            kind, inputs = "TestText", {"text": inputs["text"]}
        made[key] = (kind, {name: changes.get(name, value) for name, value in inputs.items()})
    return made


def _shown(comfyui: Any, prompt: dict[str, Any]) -> dict[str, list[Any]]:
    """Run a prompt; what its output nodes showed, by class."""
    found: dict[str, list[Any]] = {}
    for key, output in comfyui.run(prompt).items():
        found.setdefault(prompt[key][0], []).append(output)
    return found


def test_the_page_queues_what_the_files_say(saved: dict[str, Any], converted: dict[str, Flow] | None) -> None:
    if converted is None:
        pytest.skip("no Chromium shows the page")
    assert set(converted) == set(saved)
    for name, flow in converted.items():
        expected = _by_hand(saved[name])
        assert {key: node["class_type"] for key, node in flow.items()} == {
            key: node["class_type"] for key, node in expected.items()
        }
        for key, node in flow.items():
            wanted = {one: value for one, value in expected[key]["inputs"].items() if one != "control_after_generate"}
            assert {one: value for one, value in node["inputs"].items() if one in wanted} == wanted, (name, key)


@pytest.mark.parametrize(("name", "reports"), [("near_far_flux2_2048", 1), ("quality_sweep", 5)])
def test_approximating_examples_run(comfyui: Any, examples: dict[str, Flow], name: str, reports: int) -> None:
    shown = _shown(comfyui, _tiny(examples[name], size=512))
    (pictures,), (report,) = shown["SaveImage"], shown["AttentionReport"]
    assert len(pictures["images"]) == len(report["images"]) == len(report["text"]) == reports
    assert all("16 of 16 calls" in text for text in report["text"])


def test_training_examples_feed_one_another(comfyui: Any, examples: dict[str, Flow]) -> None:
    """Phase 1 writes students, phase 2 learns with them where they may serve, and the last one samples with both."""
    (comfyui.base / "input/prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    models = comfyui.base / "models/approximate_attention"
    shown = _shown(comfyui, _tiny(examples["phase1_distill_prompts"], size=256))
    assert len(shown["PreviewImage"][0]["images"]) == len(PROMPTS), "every prompt was sampled"
    assert (models / "flux2_ttr/LATEST").is_file()
    rows = (models / "flux2_ttr/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["layer"] for row in rows} == {"single:0", "single:1"}

    learn = _tiny(examples["phase2_train_controller"], size=256, training_iterations=2)
    shown = _shown(comfyui, learn)
    assert [len(one["images"]) for one in shown["PreviewImage"]] == [1, 1], "exact and approximate image"
    assert (models / "flux2_ttr_controller/LATEST").is_file()

    shown = _shown(comfyui, _tiny(examples["controller_and_report"], size=256))
    (report,) = shown["AttentionReport"]
    assert len(shown["SaveImage"][0]["images"]) == len(report["images"]) == 1
    assert "student" in report["text"][0]
    assert "the policy chose full attention" in report["text"][0]
