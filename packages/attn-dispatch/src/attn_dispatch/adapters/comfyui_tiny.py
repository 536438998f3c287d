"""A tiny Flux or Flux2 of a real ComfyUI's own classes with random weights, for tests and benchmarks of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

TEXT_WIDTH = 64
"""Channels of a text token, and of Flux's pooled text."""

NETWORKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "flux": MappingProxyType(
            {
                "image_model": "flux", "axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "patch_size": 2,
                "in_channels": 16, "out_channels": 16, "qkv_bias": True, "guidance_embed": True,
                "vec_in_dim": TEXT_WIDTH, "txt_ids_dims": [],
            }
        ),
        "flux2": MappingProxyType(
            {
                "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "theta": 2000, "mlp_ratio": 3.0, "patch_size": 1,
                "in_channels": 128, "out_channels": 128, "qkv_bias": False, "guidance_embed": True, "vec_in_dim": None,
                "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
                "default_ref_method": "index", "ref_index_scale": 10.0,
            }
        ),
    }
)  # fmt: skip
"""Settings of each network besides its size."""


def tiny_patcher(variant: str, seed: int, *, double: int, single: int, heads: int = 2, norm: float = 1.2) -> Any:
    """Make a model patcher of a running ComfyUI, float32 on its device.

    Args:
        variant: ``"flux"`` or ``"flux2"``.
        seed: Of the weights.
        double: Blocks with separate streams.
        single: Blocks with one stream.
        heads: Heads of width 128.
        norm: Scale of queries and keys; larger spreads the scores more.

    Raises:
        AttributeError: This ComfyUI has no such model.
    """
    import comfy.ldm.flux.model
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)} | {"image_model"}
    sizes = {"num_heads": heads, "hidden_size": heads * 128, "context_in_dim": TEXT_WIDTH, "depth": double}
    given = {**NETWORKS[variant], **sizes, "depth_single_blocks": single}
    kind = getattr(comfy.supported_models, {"flux": "Flux", "flux2": "Flux2"}[variant])
    config = kind({name: value for name, value in given.items() if name in known})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if "_norm" in name:
                weight.fill_(norm)
            elif weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            else:
                weight.fill_(0.1)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    device = comfy.model_management.get_torch_device()
    return patcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
