"""The pack in a real ComfyUI: COMFYUI_PATH names a checkout, COMFYUI_PYTHON the Python with its requirements."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.comfyui, pytest.mark.enable_socket]

FLOW: dict[str, Any] = {
    "seeds": ("RandomSeedBatch", {"seed": 42, "count": 2}),
    "prompts": ("LoadPromptListFromJSON", {"json_path": "prompts.json"}),
    "sweep": ("ClockedSweepValues", {"clock": "5", "values": "1, 2, 3"}),
    "pairs": ("Combinations", {"a": "1, 2", "b": ["sweep", 0]}),
}
EXPECTED = {
    ("seeds", 0): ["2053695854357871005", "5073395517033431291"],
    ("prompts", 0): ["a red apple", "a blue house"],
    ("sweep", 0): ["1.0", "1.0", "2.0", "2.0", "3.0"],
    ("pairs", 0): ["1.0", "2.0"] * 5,
    ("pairs", 1): ["1.0", "1.0", "2.0", "2.0", "3.0"] * 2,
}
WAYS = {
    "clone": (PACKAGE.parents[1], False),
    "link": (PACKAGE, False),
    "copy": (PACKAGE, True),
    "installed": (PACKAGE / "src/comfy_nodes", False),
}


@pytest.fixture(params=list(WAYS))
def server(request: pytest.FixtureRequest, start_comfyui: Any, tmp_path: Path) -> Iterator[Any]:
    """A running ComfyUI with this pack, in one of the ways to install it."""
    folder, copy = WAYS[request.param]
    # A copy has no neighbours: it needs them installed.
    installed = tuple(PACKAGE.parent.glob("*/src")) if copy else ()
    host = start_comfyui(tmp_path, {"approximate-attention": folder}, copy=copy, installed=installed)
    yield host
    host.stop()


def test_the_pack_loads_and_its_simple_nodes_run(server: Any) -> None:
    (server.base / "input/prompts.json").write_text('["a red apple", "a blue house"]', encoding="utf-8")
    known = server.get("/object_info")
    assert {"ApproximateAttention", *(node for node, _ in FLOW.values())} <= set(known)
    prompt = dict(FLOW)
    for name, slot in EXPECTED:
        prompt[f"{name}-{slot}"] = ("PreviewAny", {"source": [name, slot]})
    shown = {node: output["text"] for node, output in server.run(prompt).items()}
    assert shown == {f"{name}-{slot}": texts for (name, slot), texts in EXPECTED.items()}
    page = server.fetch("/extensions/approximate-attention/docs/Combinations.md")
    assert page.startswith(b"# Combinations")
    log = server.text()
    assert log.count("Approximate Attention: ") == 1
    assert "IMPORT FAILED" not in log


def test_translations_and_examples_are_served(comfyui: Any) -> None:
    texts = comfyui.get("/i18n")
    assert texts["zh"]["nodeDefs"]["ApproximateAttention"]["display_name"] == "近似注意力"
    assert texts["en"]["nodeDefs"]["ApproximateAttention"]["display_name"] == "Approximate Attention"
    examples = comfyui.get("/workflow_templates")["approximate-attention"]
    files = {file.stem for file in (PACKAGE / "src/comfy_nodes/example_workflows").glob("*.json")}
    assert set(examples) == files
    for name in files:
        assert "nodes" in json.loads(comfyui.fetch(f"/api/workflow_templates/approximate-attention/{name}.json"))
