import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parents[1]
NUMBERS = "STRING,*"
# id: (display name, inputs as (name, type, default, min, max, optional), outputs as (label, type))
NODES = {
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
    return {schema.node_id: schema for schema in schemas}


@pytest.fixture
def schemas(host: Any) -> dict[str, Any]:
    import comfy_nodes

    return _schemas(comfy_nodes, host)


def test_saved_workflows_find_what_they_saved(schemas: dict[str, Any]) -> None:
    assert list(schemas) == list(NODES)
    for node_id, (display_name, inputs, outputs) in NODES.items():
        schema = schemas[node_id]
        assert schema.display_name == display_name
        assert schema.category == "advanced/scheduling"
        assert [(i.id, i.type, i.default, i.min, i.max, i.optional) for i in schema.inputs] == inputs
        assert [(o.label, o.type, o.is_output_list) for o in schema.outputs] == [(*output, True) for output in outputs]
        assert all(i.multiline for i in schema.inputs if i.type == NUMBERS)
    assert [i.placeholder for i in schemas["ClockedSweepValues"].inputs] == ["0, 1, 2 or 30", "0.1, 0.2, 0.3"]


def test_everything_is_explained(schemas: dict[str, Any]) -> None:
    pages = {page.stem for page in (PACKAGE / "src/comfy_nodes/web/docs").glob("*.md")}
    assert pages == set(schemas)
    for schema in schemas.values():
        assert len(schema.description) > 40
        assert all(len(item.tooltip) > 20 for item in (*schema.inputs, *schema.outputs))
        page = (PACKAGE / f"src/comfy_nodes/web/docs/{schema.node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        assert all(f"**{item.id}**" in page for item in schema.inputs)


def test_translations_name_what_there_is(schemas: dict[str, Any]) -> None:
    for file in (PACKAGE / "locales").glob("*/nodeDefs.json"):
        translated = json.loads(file.read_text(encoding="utf-8"))
        assert set(translated) == set(schemas), file
        for node_id, texts in translated.items():
            assert {*texts["inputs"]} == {i.id for i in schemas[node_id].inputs}, (file, node_id)
            assert {*texts["outputs"]} == {str(i) for i in range(len(schemas[node_id].outputs))}, (file, node_id)


@pytest.mark.parametrize(
    "folder", [REPOSITORY, PACKAGE, PACKAGE / "src/comfy_nodes"], ids=["clone", "folder", "installed"]
)
def test_three_ways_in(folder: Path, host: Any, load_pack: Callable[[Path], ModuleType]) -> None:
    if not (folder / "__init__.py").exists():
        pytest.skip("the package stands alone here")
    pack = load_pack(folder)
    assert list(_schemas(pack, host)) == list(NODES)
    assert Path(pack.WEB_DIRECTORY, "docs/RandomSeedBatch.md").is_file()
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
