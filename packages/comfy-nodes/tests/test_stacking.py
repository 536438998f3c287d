from typing import Any

import pytest
import torch
from attn_dispatch import AttentionRouter
from attn_dispatch.adapters.comfyui import install, installed
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher
from comfy_nodes.stacking import install_below


class Answering:
    """Notes that it was asked, then asks the next."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name = name
        self.asked = asked

    def __call__(self, call: Any, native: Any) -> Any:
        self.asked.append(self.name)
        return native(call)

    def begin_run(self) -> None: ...

    def end_run(self) -> None: ...


@pytest.mark.parametrize("first", [True, False], ids=["put on first", "put on last"])
def test_it_is_asked_after_everything_else(first: bool) -> None:
    asked: list[str] = []
    model = FakeModelPatcher(FakeFlux())
    if first:
        model = install_below(model, Answering("below", asked), "below")
    for name in ("one", "two"):
        model = install(model, Answering(name, asked), key=name)
    patched = model if first else install_below(model, Answering("below", asked), "below")
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    FakeGuider(patched).sample(noise, torch.tensor([1.0, 0.0]), text, text)
    assert asked[:3] == ["two", "one", "below"]
    assert asked == ["two", "one", "below"] * (len(asked) // 3)
    if not first:
        assert list(installed(model)) == ["one", "two"]  # the node's input is left as it is


def test_a_second_one_replaces_the_first() -> None:
    model = FakeModelPatcher(FakeFlux())
    router, other = AttentionRouter(), AttentionRouter()
    model = install_below(install(model, other, key="one"), AttentionRouter(), "below")
    found = installed(install_below(model, router, "below"))
    assert list(found) == ["below", "one"]
    assert found["below"] is router
    assert found["one"] is other
