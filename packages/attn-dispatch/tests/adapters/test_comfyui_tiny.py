"""A tiny model is what its seed and its settings say."""

import pytest
import torch
from attn_dispatch.adapters.comfyui_tiny import NETWORKS, tiny_patcher

from .conftest import prepare_comfyui


@pytest.mark.comfyui
@pytest.mark.parametrize("variant", list(NETWORKS))
def test_a_seed_gives_the_same_weights_and_another_one_does_not(variant: str) -> None:
    prepare_comfyui()
    if variant == "flux2" and not hasattr(pytest.importorskip("comfy.supported_models"), "Flux2"):
        pytest.skip("this ComfyUI has no Flux2")
    one, same, other = (
        tiny_patcher(variant, seed, double=1, single=2, heads=1).model.diffusion_model for seed in (5, 5, 6)
    )
    assert (len(one.double_blocks), len(one.single_blocks), one.hidden_size) == (1, 2, 128)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(first, second) for first, second, _ in pairs)
    assert any(not torch.equal(first, third) for first, _, third in pairs)
