"""A node pack for tests: a tiny Flux or Flux.2 of ComfyUI's own classes with random weights, and nodes that compare."""

import zlib
from typing import Any

import torch
from attn_dispatch.adapters.comfyui_tiny import NETWORKS, TEXT_WIDTH, tiny_patcher
from torch import Tensor

WORDS = 7
WIDTHS = {"flux": (16, 8), "flux2": (128, 16)}  # channels of the latent, pixels of one latent pixel


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _extra() -> dict[str, Any]:
    return {"guidance": 3.5, "pooled_output": _randn(9, 1, TEXT_WIDTH)}


def _patcher(variant: str, seed: int, double: int, single: int) -> Any:
    return tiny_patcher(variant, seed, double=double, single=single, norm=1.3)


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
        side = size // pixels
        extra = _extra()
        if references:
            extra["reference_latents"] = [_randn(20 + one, 1, channels, side, side) for one in range(references)]
        if masked:
            grid = side // NETWORKS[variant]["patch_size"]
            mask = torch.zeros(1, WORDS + grid**2, WORDS + grid**2)
            mask[:, :, WORDS - 1] = -10000.0  # the last word is not seen
            extra |= {"attention_mask": mask, "attention_mask_img_shape": (grid, grid)}
        prompts = [[[_randn(one, 1, WORDS, TEXT_WIDTH), dict(extra)]] for one in (1, 2)]
        latent = {"samples": torch.zeros(batch, channels, side, side), "downscale_ratio_spacial": pixels}
        return (_patcher(variant, seed, double, single), *prompts, latent, LinearVAE(variant))


class TestText:
    """Stands in for a text encoder: every text has a conditioning of its own."""

    CATEGORY, FUNCTION = "test", "encode"
    RETURN_TYPES = ("CONDITIONING",)
    __test__ = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"multiline": True})}}

    def encode(self, text: str) -> tuple[Any, ...]:
        return ([[_randn(zlib.crc32(text.encode()), 1, WORDS, TEXT_WIDTH), _extra()]],)


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


NODE_CLASS_MAPPINGS = {one.__name__: one for one in (TestFlux, TestText, TestCompare, TestShow)}
