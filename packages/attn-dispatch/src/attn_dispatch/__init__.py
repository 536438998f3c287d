"""One seam for every attention call: route it, guard it, measure it.

Names are loaded when they are first used: importing the package alone reads no other module.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_dispatch.adapters.sdpa import SdpaMode
    from attn_dispatch.call import (
        AttentionCall,
        AttentionFallback,
        AttentionHandler,
        LayerKey,
        NativeAttention,
        StepContext,
        TokenLayout,
    )
    from attn_dispatch.default import (
        attention_backend,
        auto_detect_precision,
        auto_select,
        dispatch_attention,
        dispatch_attention_varlen,
        explain,
        get_backend,
        get_backend_label,
        set_backend,
    )
    from attn_dispatch.finite import FiniteBackend
    from attn_dispatch.guards import LayerRange, MinTokens, PaysOff, SigmaBelow
    from attn_dispatch.masks import join_mask, split_mask
    from attn_dispatch.probe import FidelityProbe, FidelityRow
    from attn_dispatch.report import DispatchReport, DispatchRow
    from attn_dispatch.router import AttentionRouter, Backend, Guard, NativeHandler, Route, RunObserver, StepObserver

_HOMES = MappingProxyType(
    {
        "adapters.sdpa": ("SdpaMode",),
        "call": (
            "AttentionCall",
            "AttentionFallback",
            "AttentionHandler",
            "LayerKey",
            "NativeAttention",
            "StepContext",
            "TokenLayout",
        ),
        "default": (
            "attention_backend",
            "auto_detect_precision",
            "auto_select",
            "dispatch_attention",
            "dispatch_attention_varlen",
            "explain",
            "get_backend",
            "get_backend_label",
            "set_backend",
        ),
        "finite": ("FiniteBackend",),
        "guards": ("LayerRange", "MinTokens", "PaysOff", "SigmaBelow"),
        "masks": ("join_mask", "split_mask"),
        "probe": ("FidelityProbe", "FidelityRow"),
        "report": ("DispatchReport", "DispatchRow"),
        "router": (
            "AttentionRouter",
            "Backend",
            "Guard",
            "NativeHandler",
            "Route",
            "RunObserver",
            "StepObserver",
        ),
    }
)
"""Where each public name is defined."""

__all__ = [
    "AttentionCall",
    "AttentionFallback",
    "AttentionHandler",
    "AttentionRouter",
    "Backend",
    "DispatchReport",
    "DispatchRow",
    "FidelityProbe",
    "FidelityRow",
    "FiniteBackend",
    "Guard",
    "LayerKey",
    "LayerRange",
    "MinTokens",
    "NativeAttention",
    "NativeHandler",
    "PaysOff",
    "Route",
    "RunObserver",
    "SdpaMode",
    "SigmaBelow",
    "StepContext",
    "StepObserver",
    "TokenLayout",
    "attention_backend",
    "auto_detect_precision",
    "auto_select",
    "dispatch_attention",
    "dispatch_attention_varlen",
    "explain",
    "get_backend",
    "get_backend_label",
    "join_mask",
    "set_backend",
    "split_mask",
]


def __getattr__(name: str) -> object:
    """Load the module that defines a public name and keep the name here."""
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})
