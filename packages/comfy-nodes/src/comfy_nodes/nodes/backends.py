"""Nodes that put one approximation with all its options on a model."""

from typing import Any

from attn_dispatch.adapters.comfyui import install, uninstall
from attn_dispatch.backends import (
    HybridBackend,
    HybridBackendConfig,
    Option,
    TaylorBackend,
    TaylorBackendConfig,
    options_of,
)
from attn_dispatch.finite import FiniteBackend
from attn_dispatch.router import AttentionRouter, Route
from comfy_api.latest import io

from ..measured import Measured
from ..memory import reserve_memory
from ..paths import output_folder
from ..schema import ATTENTION_MENU, config_from, inputs_of, node_schema, widget
from ..stacking import HYBRID, TAYLOR

_MODEL = "The diffusion model; the input itself is left as it is."
_PATCHED = "The model with the approximation; link it to a sampler or to further attention nodes."

_SAVED_TAYLOR = tuple(one.name for one in options_of(TaylorBackendConfig))[:48]
_SAVED_HYBRID = tuple(one.name for one in options_of(HybridBackendConfig))[:24]
"""Options in the order in which workflows saved them; later ones may be missing in a workflow."""

_BASIC = ("P", "min_tokens", "sub_head_blocks", "fused_kernel", "taylor_sigma_max", "local_window", "global_weight")


class TaylorAttentionBackend(io.ComfyNode):  # type: ignore[misc]
    """Attention by a truncated series, with every option."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        backend = Option("taylor = use the series where its limits allow it; standard = take it off again.")
        return node_schema(
            node_id="TaylorAttentionBackend",
            display_name="Taylor Attention Backend",
            category=ATTENTION_MENU,
            description="Replaces exp in attention by a Taylor series, so that its cost grows with the number of "
            "tokens and not with its square. Calls that the limits below do not allow, or whose denominators are bad, "
            "stay exact. For most images Approximate Attention is faster and closer.",
            search_aliases=["taylor", "linear attention", "fast attention", "speed up", "attention backend"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                widget("backend", "taylor", Option(backend.help, choices=("standard", "taylor"))),
                *_options(TaylorBackendConfig, _SAVED_TAYLOR),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip=_PATCHED)],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Any, backend: str, **options: Any) -> io.NodeOutput:
        """Put the series on a clone of the model."""
        if backend == "standard":
            return io.NodeOutput(uninstall(model, key=TAYLOR))
        config = config_from(TaylorBackendConfig, options)
        series = TaylorBackend(config, reserve=reserve_memory)
        router = AttentionRouter([Route(FiniteBackend(series))])
        handler = Measured(router, config.quality_check_samples if config.quality_check else 0)
        return io.NodeOutput(install(model, handler, key=TAYLOR))


class HybridTaylorAttentionBackend(io.ComfyNode):  # type: ignore[misc]
    """Exact near by, a series for the rest, with every option."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        enabled = Option("On = use hybrid attention; off = take it off again.")
        return node_schema(
            node_id="HybridTaylorAttentionBackend",
            display_name="Hybrid Taylor Attention Backend",
            category=ATTENTION_MENU,
            description="Keeps attention to near tokens exact and approximates the rest by a Taylor series over few "
            "coordinates. Near is a window of the token sequence, or with radius a neighbourhood on the image.",
            search_aliases=["hybrid", "taylor", "window attention", "local attention", "fast attention", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                widget("enabled", False, enabled),
                *_options(HybridBackendConfig, _SAVED_HYBRID),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip=_PATCHED)],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Any, enabled: bool, **options: Any) -> io.NodeOutput:
        """Put hybrid attention on a clone of the model."""
        if not enabled:
            return io.NodeOutput(uninstall(model, key=HYBRID))
        config = config_from(HybridBackendConfig, options)
        record = output_folder() / "hybrid-attention-results.jsonl" if config.log_quality_stats else None
        meta = {"model_class": type(getattr(model, "model", model)).__name__}
        backend = HybridBackend(config, record_path=record, meta=meta)
        router = AttentionRouter([Route(FiniteBackend(backend))])
        handler = Measured(router, 64 if config.log_quality_stats else 0)
        return io.NodeOutput(install(model, handler, key=HYBRID))


def _options(config: Any, saved: tuple[str, ...]) -> list[io.Input]:
    """Inputs of all options: those that workflows know, in their order, then the later ones."""
    later = [one.name for one in options_of(config) if one.name not in saved]
    folded = tuple(name for name in saved if name not in _BASIC)
    return [*inputs_of(config, *saved, advanced=folded), *inputs_of(config, *later, advanced=True, optional=True)]
