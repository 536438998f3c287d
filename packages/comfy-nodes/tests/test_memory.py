import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comfy_nodes.memory import reserve_memory


def test_models_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    used, idle = SimpleNamespace(currently_used=True), SimpleNamespace(currently_used=False)
    asked = []
    comfy, management = ModuleType("comfy"), ModuleType("comfy.model_management")
    vars(comfy)["model_management"] = management
    vars(management).update(
        current_loaded_models=[used, idle],
        free_memory=lambda needed, device, keep_loaded: asked.append((needed, device, keep_loaded)),
    )
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    reserve_memory(1000, torch.device("cpu"))
    assert asked == []
    reserve_memory(1000, torch.device("cuda", 0))
    assert asked == [(1000, torch.device("cuda", 0), [used])]
