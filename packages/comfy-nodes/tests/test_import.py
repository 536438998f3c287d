"""What loading the pack costs a ComfyUI that has torch already."""

import subprocess
import sys
from pathlib import Path

OURS = {"attn_dispatch", "attn_kernels", "comfy_nodes", "safetensors", "ttr_controller", "ttr_distill", "value_utils"}
# Seconds of processor time, of which it needs a third; a machine that is busy or slow must not fail.
MOST = 0.45
CODE = """
import sys, time
import torch
from types import ModuleType, SimpleNamespace
from conftest import PreviewImage, fake_io
for name in ("comfy_api", "comfy_api.latest"):
    sys.modules[name] = ModuleType(name)
vars(sys.modules["comfy_api.latest"]).update(
    ComfyExtension=object, io=fake_io(new=True), ui=SimpleNamespace(PreviewImage=PreviewImage)
)
before, start = set(sys.modules), time.process_time()
import comfy_nodes
comfy_nodes.comfy_entrypoint()
spent = time.process_time() - start
print(spent, *sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted(name for name in set(sys.modules) - before if name.startswith("torch.")))
"""


def test_loading_the_pack_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    first, torch_parts = done.stdout.splitlines()[-2:]
    spent, *modules = first.split()
    assert set(modules) <= OURS
    assert "attn_dispatch" in modules
    assert torch_parts == ""
    assert float(spent) < MOST
