"""What students need to know of a model; the rest of the adapter is tested in ``test_comfyui.py``."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attn_dispatch import LayerKey
from torch import nn
from ttr_distill.adapters.comfyui_model import describe_model


class Named(nn.Module):
    """A network that writes block names into its options."""

    def name(self, options: dict[str, Any]) -> None:
        options["block_type"] = "double"


class Flux(Named):
    def __init__(self, seed: int = 0, double: int = 2, single: int = 3) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = 2, 32
        self.double_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(double))
        self.single_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(single))
        self.img_in = nn.Linear(8, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)


class QwenImage(Named):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = SimpleNamespace(heads=3, dim_head=16)
        self.transformer_blocks = nn.ModuleList([block, nn.Module()])


class ZImage(Named):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attention = SimpleNamespace(n_local_heads=5, head_dim=8)
        self.layers = nn.ModuleList([block])


class Wan(Named):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.dim = 4, 48
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = 2, 32
        self.double_blocks = nn.ModuleList([nn.Module()])
        self.single_blocks = nn.ModuleList([nn.Module()])


def patcher(network: nn.Module, backup: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=network), backup=backup or {})


@pytest.mark.parametrize(
    ("network", "layers", "heads", "width"),
    [
        (Flux(), "double:0 double:1 single:0 single:1 single:2", 2, 16),
        (QwenImage(), "double:0 double:1", 3, 16),
        (ZImage(), "double:0", 5, 8),
        (Wan(), "double:0 double:1", 4, 12),
    ],
)
def test_layers_and_shape(network: nn.Module, layers: str, heads: int, width: int) -> None:
    found = describe_model(patcher(network))
    assert " ".join(map(str, found.layers)) == layers
    assert (found.heads, found.width, found.family) == (heads, width, type(network).__name__)


@pytest.mark.parametrize("network", [Nameless(), nn.Linear(2, 2)])
def test_a_family_without_block_names_is_said(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"this ComfyUI does not name the blocks of \w+; use a Flux, Flux2"):
        describe_model(patcher(network))


def test_fingerprint_is_of_the_weights_before_loras() -> None:
    first = describe_model(patcher(Flux())).fingerprint
    assert first == describe_model(patcher(Flux())).fingerprint
    assert first != describe_model(patcher(Flux(seed=1))).fingerprint
    assert first != describe_model(patcher(Flux(single=4))).fingerprint
    changed = Flux()
    saved = namedtuple("saved", "weight")(changed.img_in.weight.detach().clone())
    with torch.no_grad():
        changed.img_in.weight.add_(1.0)
    assert first != describe_model(patcher(changed)).fingerprint
    assert first == describe_model(patcher(changed, {"diffusion_model.img_in.weight": saved})).fingerprint


def test_range_of_layers() -> None:
    model = describe_model(patcher(Flux()))
    assert model.range() == tuple(LayerKey("single", index) for index in range(3))
    assert model.range(1, 1, "all") == (LayerKey("double", 1), LayerKey("single", 1))
    assert model.range(1) == (LayerKey("single", 1), LayerKey("single", 2))
    assert describe_model(patcher(Wan())).range() == (LayerKey("double", 0), LayerKey("double", 1))
    with pytest.raises(ValueError, match=r"no block of Flux lies in the layers 3 to 9; it has 2 double"):
        model.range(3, 9)
