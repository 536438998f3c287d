"""A node pack for tests: a tiny Flux or Flux.2 of ComfyUI's own classes with random weights, and nodes that compare."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

WIDTHS = {"flux": (16, 8), "flux2": (128, 16)}  # channels of the latent, pixels of one latent pixel
TEXT, POOLED = 64, 64
NETWORKS: dict[str, dict[str, Any]] = {
    "flux": {
        "image_model": "flux", "axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "patch_size": 2,
        "in_channels": 16, "out_channels": 16, "qkv_bias": True, "guidance_embed": True, "vec_in_dim": POOLED,
        "txt_ids_dims": [],
    },
    "flux2": {
        "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "theta": 2000, "mlp_ratio": 3.0, "patch_size": 1,
        "in_channels": 128, "out_channels": 128, "qkv_bias": False, "guidance_embed": True, "vec_in_dim": None,
        "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
        "default_ref_method": "index", "ref_index_scale": 10.0,
    },
}  # fmt: skip


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _patcher(variant: str, seed: int, double: int, single: int) -> Any:
    import comfy.ldm.flux.model
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)} | {"image_model"}
    sizes = {"num_heads": 2, "hidden_size": 256, "context_in_dim": TEXT, "depth": double}
    given = {**NETWORKS[variant], **sizes, "depth_single_blocks": single}
    kind = getattr(comfy.supported_models, {"flux": "Flux", "flux2": "Flux2"}[variant])
    config = kind({name: value for name, value in given.items() if name in known})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if "_norm" in name:
                weight.fill_(1.3)
            elif weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            else:
                weight.fill_(0.1)
    made = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    device = comfy.model_management.get_torch_device()
    return made(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())


class LinearVAE:
    """Stands in for a VAE: three channels of the latent as colours."""

    def __init__(self, variant: str) -> None:
        self.latent_channels, self.factor = WIDTHS[variant]

    def decode(self, samples: Tensor, **_: Any) -> Tensor:
        pixels = torch.nn.functional.interpolate(samples[:, :3].float(), scale_factor=self.factor)
        return pixels.sigmoid().movedim(1, -1).contiguous()

    def encode(self, pixels: Tensor, **_: Any) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), self.factor)
        return small.repeat(1, -(-self.latent_channels // 3), 1, 1)[:, : self.latent_channels]

    def spacial_compression_decode(self) -> int:
        return self.factor


class TestFlux:
    """A model with all that a sampler wants."""

    CATEGORY, FUNCTION = "test", "make"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT", "VAE")
    __test__ = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = {"min": 0, "max": 4096}
        return {
            "required": {"variant": (list(NETWORKS),), "size": ("INT", {"default": 256, **whole})},
            "optional": {
                "batch": ("INT", {"default": 1, **whole}),
                "references": ("INT", {"default": 0, **whole}),
                "masked": ("BOOLEAN", {"default": False}),
                "seed": ("INT", {"default": 0, **whole}),
                "double": ("INT", {"default": 2, **whole}),
                "single": ("INT", {"default": 2, **whole}),
            },
        }

    def make(
        self,
        variant: str,
        size: int,
        batch: int = 1,
        references: int = 0,
        masked: bool = False,
        seed: int = 0,
        double: int = 2,
        single: int = 2,
    ) -> tuple[Any, ...]:
        channels, pixels = WIDTHS[variant]
        side, words = size // pixels, 7
        extra: dict[str, Any] = {"guidance": 3.5, "pooled_output": _randn(9, 1, POOLED)}
        if references:
            extra["reference_latents"] = [_randn(20 + one, 1, channels, side, side) for one in range(references)]
        if masked:
            grid = side // NETWORKS[variant]["patch_size"]
            mask = torch.zeros(1, words + grid**2, words + grid**2)
            mask[:, :, words - 1] = -10000.0  # the last word is not seen
            extra |= {"attention_mask": mask, "attention_mask_img_shape": (grid, grid)}
        prompts = [[[_randn(one, 1, words, TEXT), dict(extra)]] for one in (1, 2)]
        latent = {"samples": torch.zeros(batch, channels, side, side), "downscale_ratio_spacial": pixels}
        return (_patcher(variant, seed, double, single), *prompts, latent, LinearVAE(variant))


class TestCompare:
    """How far two latents are from each other."""

    CATEGORY, FUNCTION, OUTPUT_NODE = "test", "compare", True
    RETURN_TYPES = ("FLOAT",)
    __test__ = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"a": ("LATENT",), "b": ("LATENT",)}}

    def compare(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Any]:
        one, other = a["samples"], b["samples"]
        distance = float((one - other).norm() / one.norm()) if one.isfinite().all() and other.isfinite().all() else 9.0
        return {"ui": {"relative": [distance], "equal": [one.equal(other)]}, "result": (distance,)}


class TestShow:
    """Any value as text."""

    CATEGORY, FUNCTION, OUTPUT_NODE = "test", "show", True
    RETURN_TYPES = ()
    __test__ = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True

    def show(self, value: object) -> dict[str, Any]:
        return {"ui": {"text": [str(value)]}, "result": ()}


NODE_CLASS_MAPPINGS = {"TestFlux": TestFlux, "TestCompare": TestCompare, "TestShow": TestShow}
