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


TINY = {"UNETLoader": 0, "CLIPTextEncode": 1, "EmptyFlux2LatentImage": 3, "VAELoader": 4}
"""Which output of the tiny model stands in for a node that needs downloads."""


def _prompt(flow: dict[str, Any], size: int) -> dict[str, Any]:
    """What the page would queue for a saved workflow, with a tiny model in place of the one it names."""
    nodes = {node["id"]: node for node in flow["nodes"] if node["type"] != "MarkdownNote"}
    sources = {link[0]: (link[1], link[2]) for link in flow["links"]}
    prompt: dict[str, Any] = {"tiny": ("TestFlux", {"variant": "flux2", "size": size})}
    for key, node in nodes.items():
        if node["type"] in TINY or node["type"] == "CLIPLoader":
            continue
        inputs = {name: value for name, value in node.get("widgets_values_named", {}).items() if value is not None}
        for item in node.get("inputs", ()):
            if item["link"] is not None:
                source, slot = sources[item["link"]]
                stand_in = TINY.get(nodes[source]["type"])
                inputs[item["name"]] = [str(source), slot] if stand_in is None else ["tiny", stand_in]
        prompt[str(key)] = (node["type"], inputs)
    return prompt


@pytest.mark.parametrize(("name", "reports"), [("near_far_flux2_2048", 1), ("quality_sweep", 5)])
def test_examples_run(comfyui: Any, name: str, reports: int) -> None:
    flow = json.loads((PACKAGE / f"src/comfy_nodes/example_workflows/{name}.json").read_text(encoding="utf-8"))
    prompt = _prompt(flow, size=512)
    outputs = comfyui.run(prompt)
    by_class = {prompt[key][0]: shown for key, shown in outputs.items()}
    assert len(by_class["SaveImage"]["images"]) == reports
    texts = by_class["AttentionReport"]["text"]
    assert len(texts) == reports
    assert len(by_class["AttentionReport"]["images"]) == reports
    assert all("16 of 16 calls" in text for text in texts)
