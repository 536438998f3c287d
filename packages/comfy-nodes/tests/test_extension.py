import asyncio
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE = PACKAGE / "src/comfy_nodes"
REPOSITORY = PACKAGE.parents[1]
NUMBERS = "STRING,FLOAT,INT,*"
WIDGETS = ("BOOLEAN", "COMBO", "FLOAT", "INT", "STRING")
# id: (display name, inputs as (name, type, default, min, max, optional), outputs as (label, type))
VALUES = {
    "RandomSeedBatch": (
        "Random Seed Batch",
        [("seed", "INT", 0, 0, 2**64 - 1, False), ("count", "INT", 8, 1, 4096, False)],
        [("seeds", "INT")],
    ),
    "LoadPromptListFromJSON": (
        "LoadPromptListFromJSON",
        [("json_path", "STRING", "", None, None, False)],
        [("prompts", "STRING")],
    ),
    "ClockedSweepValues": (
        "Clocked Sweep Values",
        [("clock", NUMBERS, None, None, None, False), ("values", NUMBERS, None, None, None, False)],
        [("values", "FLOAT")],
    ),
    "Combinations": (
        "Combinations",
        [("a", NUMBERS, None, None, None, False), *((name, NUMBERS, None, None, None, True) for name in "bcd")],
        [(f"{name}_out", "FLOAT") for name in "abcd"],
    ),
}


def _schemas(pack: ModuleType, host: Any) -> dict[str, Any]:
    extension = pack.comfy_entrypoint()
    assert isinstance(extension, host.extension)
    schemas = [node.define_schema() for node in asyncio.run(extension.get_node_list())]
    found = {schema.node_id: schema for schema in schemas}
    assert len(found) == len(schemas)
    return found


@pytest.fixture
def schemas(host: Any) -> dict[str, Any]:
    import comfy_nodes

    return _schemas(comfy_nodes, host)


def _inputs(schema: Any) -> list[tuple[Any, ...]]:
    return [(i.id, i.type, i.default, i.min, i.max, i.optional) for i in schema.inputs]


def test_saved_workflows_find_what_they_saved(schemas: dict[str, Any]) -> None:
    for node_id, (display_name, inputs, outputs) in VALUES.items():
        schema = schemas[node_id]
        assert schema.display_name == display_name
        assert schema.category == "advanced/scheduling"
        assert _inputs(schema) == inputs
        assert [(o.label, o.type, o.is_output_list) for o in schema.outputs] == [(*output, True) for output in outputs]
        assert all(i.multiline for i in schema.inputs if i.type == NUMBERS)
    assert [i.placeholder for i in schemas["ClockedSweepValues"].inputs] == ["0, 1, 2 or 30", "0.1, 0.2, 0.3"]


def test_an_older_host_gets_the_same_nodes(old_host: Any) -> None:
    import comfy_nodes

    schemas = _schemas(comfy_nodes, old_host)
    assert {"ApproximateAttention", "TaylorAttentionBackend", *VALUES} <= set(schemas)
    assert not any(hasattr(schema, "search_aliases") for schema in schemas.values())
    assert not any(item.advanced for schema in schemas.values() for item in schema.inputs)


def test_everything_is_explained(schemas: dict[str, Any]) -> None:
    pages = {page.stem for page in (SOURCE / "web/docs").glob("*.md")}
    assert pages == set(schemas)
    for name, schema in schemas.items():
        assert len(schema.description) > 40, name
        assert schema.search_aliases, name
        for item in (*schema.inputs, *schema.outputs):
            assert len(item.tooltip or "") > 15, (name, item.id)
            assert item.tooltip.endswith("."), (name, item.id)
        page = (SOURCE / f"web/docs/{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n"), name
        assert [item.id for item in schema.inputs if f"**{item.id}**" not in page] == [], name


def test_numbers_of_a_saved_workflow_stay_where_they_are(schemas: dict[str, Any]) -> None:
    """The page moves a whole number to minimum + n * step, and a number with a point to its rounding."""
    for name, schema in schemas.items():
        for item in schema.inputs:
            if item.type == "INT":
                step = item.step or 1
                assert (item.min or 0) % step == 0 or item.min == -1, (name, item.id)
                assert ((item.default or 0) - (item.min or 0)) % step == 0, (name, item.id)
            if item.type == "FLOAT" and item.min and item.step:
                assert abs(item.min / item.step - round(item.min / item.step)) < 1e-6, (name, item.id)
            if item.type in ("INT", "FLOAT") and item.min is not None:
                assert item.min <= item.default <= item.max, (name, item.id)


@pytest.mark.parametrize(
    ("alias", "node"), [("fast attention", "ApproximateAttention"), ("taylor", "TaylorAttentionBackend")]
)
def test_search_finds(schemas: dict[str, Any], alias: str, node: str) -> None:
    assert alias in schemas[node].search_aliases


def test_translations_name_what_there_is(schemas: dict[str, Any]) -> None:
    files = {file.parent.name: file for file in (SOURCE / "locales").glob("*/nodeDefs.json")}
    assert set(files) == {"en", "zh"}
    for file in files.values():
        translated = json.loads(file.read_text(encoding="utf-8"))
        assert set(translated) == set(schemas), file
        for node_id, texts in translated.items():
            assert texts["display_name"], (file, node_id)
            assert texts["description"], (file, node_id)
            assert {*texts["inputs"]} == {i.id for i in schemas[node_id].inputs}, (file, node_id)
            assert {*texts["outputs"]} == {str(i) for i in range(len(schemas[node_id].outputs))}, (file, node_id)
            for entry in (*texts["inputs"].values(), *texts["outputs"].values()):
                assert entry["name"], (file, node_id, entry)
                assert entry["tooltip"], (file, node_id, entry)


def test_english_says_what_the_nodes_say(schemas: dict[str, Any]) -> None:
    """After a change of a text: ``python packages/comfy-nodes/tests/write_locales.py``."""
    texts = json.loads((SOURCE / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    for name, schema in schemas.items():
        assert texts[name]["description"] == schema.description, name
        for item in schema.inputs:
            assert texts[name]["inputs"][item.id]["tooltip"] == item.tooltip, (name, item.id)
        for index, item in enumerate(schema.outputs):
            assert texts[name]["outputs"][str(index)]["tooltip"] == item.tooltip, (name, index)


@pytest.mark.parametrize("folder", [REPOSITORY, PACKAGE, SOURCE], ids=["clone", "folder", "installed"])
def test_three_ways_in(folder: Path, host: Any, load_pack: Callable[[Path], ModuleType]) -> None:
    if not (folder / "__init__.py").exists():
        pytest.skip("the package stands alone here")
    pack = load_pack(folder)
    assert "ApproximateAttention" in _schemas(pack, host)
    assert Path(pack.WEB_DIRECTORY, "docs/RandomSeedBatch.md").is_file()
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")


def test_two_packs_with_the_same_module_names(
    host: Any, tmp_path: Path, load_pack: Callable[[Path], ModuleType]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("__init__", "schema", "measured", "paths", "nodes"):
        (other / f"{name}.py").write_text(f"NAME = {name!r}\n", encoding="utf-8")
    (other / "__init__.py").write_text("from . import schema, measured, paths, nodes\n", encoding="utf-8")
    before = load_pack(other)
    ours = _schemas(load_pack(SOURCE), host)
    after = load_pack(other)
    assert "ApproximateAttention" in ours
    assert before.nodes.NAME == after.nodes.NAME == "nodes"


def test_one_line_of_log(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    import comfy_nodes

    with caplog.at_level(logging.INFO):
        nodes = asyncio.run(comfy_nodes.comfy_entrypoint().get_node_list())
    lines = [one for one in caplog.records if one.name.startswith("comfy_nodes")]
    assert len(lines) == 1
    assert f"{len(nodes)} nodes" in lines[0].getMessage()


@pytest.mark.parametrize("folder", [PACKAGE, SOURCE], ids=["folder", "installed"])
def test_a_copy_loads_where_the_packages_are_installed(
    folder: Path, host: Any, tmp_path: Path, load_pack: Callable[[Path], ModuleType]
) -> None:
    copy = tmp_path / "custom_nodes/approximate-attention"
    shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    pack = load_pack(copy)
    assert "ApproximateAttention" in _schemas(pack, host)
    assert Path(pack.WEB_DIRECTORY).is_relative_to(copy)


@pytest.mark.parametrize("folder", [PACKAGE, SOURCE], ids=["folder", "installed"])
def test_the_page_finds_translations_and_examples(folder: Path) -> None:
    """ComfyUI looks in the folder that lies in custom_nodes; the package's own are links to the installed ones."""
    assert (folder / "locales/zh/nodeDefs.json").is_file()
    assert (folder / "example_workflows").is_dir()


def test_requirements_leave_torch_alone() -> None:
    lines = (PACKAGE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = {re.split(r"[<>=~! ]", line)[0] for line in lines if line and not line.startswith("#")}
    assert named == {"numpy", "pillow", "safetensors"}


def test_examples_have_pictures() -> None:
    folder = SOURCE / "example_workflows"
    for file in folder.glob("*.json"):
        flow = json.loads(file.read_text(encoding="utf-8"))
        assert {"nodes", "links", "version"} <= set(flow), file
        assert file.with_suffix(".jpg").stat().st_size > 10_000, file


def test_examples_use_nodes_as_they_are(schemas: dict[str, Any]) -> None:
    """A saved workflow holds its values by place: one for each widget, in the order of the inputs."""
    for file in (SOURCE / "example_workflows").glob("*.json"):
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            schema = schemas.get(node["type"])
            if schema is not None:
                widgets = [one for one in schema.inputs if one.type.partition(",")[0] in WIDGETS]
                assert len(node.get("widgets_values", ())) == len(widgets) + _seed_controls(widgets), (
                    file.name,
                    node["type"],
                )


def _seed_controls(widgets: list[Any]) -> int:
    """The page puts a second widget behind each seed: what becomes of it after a run."""
    return sum(one.id in ("seed", "noise_seed") or bool(one.control_after_generate) for one in widgets)
