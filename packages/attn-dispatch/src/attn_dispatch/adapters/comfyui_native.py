"""ComfyUI's own attention functions, for the dispatcher of exact attention.

ComfyUI is present where it has been loaded already; it is never imported from here, since importing it reads the
command line. Works with ComfyUI 0.3.64 to 0.33; facts about its functions were read there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from attn_dispatch.native.bindings import DenseKernel, aligned_bias

_ATTENTION = "comfy.ldm.modules.attention"
_DEVICES = "comfy.model_management"

# Candidate of the catalog -> name under which ComfyUI registers its function.
_REGISTERED: Mapping[str, str] = MappingProxyType(
    {
        "ck_int8": "comfy_kitchen_int8",
        "flash2": "flash",
        "sage2": "sage",
        "sage3": "sage3",
        "sdpa": "pytorch",
        "xformers": "xformers",
    }
)
_TAKES_MASKS = frozenset({"ck_int8", "sdpa", "xformers"})
# It runs SDPA up to 1,024 tokens, without a word.
_MIN_TOKENS: Mapping[str, int] = MappingProxyType({"sage3": 1025})


@dataclass(frozen=True)
class ComfyUIAttention:
    """One attention function of ComfyUI, called as its models call it.

    Attributes:
        function: ``function(q, k, v, heads, mask=..., skip_reshape=True, skip_output_reshape=..., **options)``.
        key: Candidate of the catalog that it runs.
        masks: Whether it takes a mask.
        min_tokens: Fewest queries for which it runs what it is named after.
    """

    function: Callable[..., Any]
    key: str
    masks: bool = False
    min_tokens: int = 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        skip_output_reshape: bool,
        options: Mapping[str, object],
    ) -> Tensor:
        """Attend; see ``HostAttention``."""
        if scale is not None:
            # Older functions ignore the keyword; scaled queries mean the same to all of them.
            q = q * (scale * q.shape[-1] ** 0.5)
        heads = q.shape[1]
        if k.shape[1] != heads:
            k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        if mask is not None:
            mask = aligned_bias(mask, q, k) if self.key == "xformers" else mask[(None,) * (4 - mask.ndim)]
        output = self.function(
            q,
            k,
            v,
            heads,
            mask=mask,
            skip_reshape=True,
            skip_output_reshape=skip_output_reshape,
            **options,
        )
        if not isinstance(output, Tensor):
            raise TypeError(f"ComfyUI's attention returned {type(output).__name__}, not a tensor")
        return output


class ComfyUIHost:
    """ComfyUI, wherever it is loaded; looks each time, since it may be loaded after this object was made."""

    @property
    def name(self) -> str:
        """``"ComfyUI"``."""
        return "ComfyUI"

    def device(self) -> torch.device | None:
        """Return the device that ComfyUI runs models on; ``None`` if it is not loaded."""
        management = sys.modules.get(_DEVICES)
        if management is None:
            return None
        device = management.get_torch_device()
        if not isinstance(device, torch.device):
            return None
        return device if device.type != "cuda" or device.index is not None else torch.device("cuda", 0)

    def attention(self, key: str) -> ComfyUIAttention | None:
        """Return ComfyUI's own function for a candidate; ``None`` if it has none or is not loaded."""
        module, name = sys.modules.get(_ATTENTION), _REGISTERED.get(key)
        if module is None or name is None:
            return None
        function = getattr(module, "REGISTERED_ATTENTION_FUNCTIONS", {}).get(name)
        if function is None and key == "sdpa":
            function = getattr(module, "attention_pytorch", None)
        if function is None:
            return None
        return ComfyUIAttention(function, key, key in _TAKES_MASKS, _MIN_TOKENS.get(key, 0))

    def guest(self, kernel: DenseKernel) -> ComfyUIAttention | None:
        """Wrap a kernel as ComfyUI wraps its own, so that overrides in ``transformer_options`` reach it."""
        wrap = getattr(sys.modules.get(_ATTENTION), "wrap_attn", None)
        if wrap is None:
            return None
        return ComfyUIAttention(wrap(_as_comfyui_attention(kernel)), "guest", masks=True)


def _as_comfyui_attention(kernel: DenseKernel) -> Callable[..., Tensor]:
    """Give a kernel the signature of ComfyUI's backends, both layouts included."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **options: Any,
    ) -> Tensor:
        if not skip_reshape:
            width = q.shape[-1] // heads
            q, k, v = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
        output = kernel(q, k, v, mask, 0.0, options.get("scale"))
        return output if skip_output_reshape else output.transpose(1, 2).flatten(2)

    return attention
