"""Write the English locale file from what the nodes say: ``python packages/comfy-nodes/tests/write_locales.py``."""

import asyncio
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src/comfy_nodes"


def english(schema: Any) -> dict[str, Any]:
    """Texts of one node as ComfyUI reads them."""
    outputs = {
        str(index): {"name": one.label or one.type, "tooltip": one.tooltip} for index, one in enumerate(schema.outputs)
    }
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {one.id: {"name": one.display_name or one.id, "tooltip": one.tooltip} for one in schema.inputs},
        "outputs": outputs,
    }


def main() -> None:
    """Load the pack against the stand-in and write the file."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import PreviewImage, fake_io

    for name in ("comfy_api", "comfy_api.latest"):
        sys.modules[name] = ModuleType(name)
    vars(sys.modules["comfy_api.latest"]).update(
        ComfyExtension=object, io=fake_io(new=True), ui=SimpleNamespace(PreviewImage=PreviewImage)
    )
    import comfy_nodes

    nodes = asyncio.run(comfy_nodes.comfy_entrypoint().get_node_list())
    texts = {schema.node_id: english(schema) for schema in (node.define_schema() for node in nodes)}
    file = SOURCE / "locales/en/nodeDefs.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
