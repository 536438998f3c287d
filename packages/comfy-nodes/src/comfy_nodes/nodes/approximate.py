"""The two nodes that most people need: a good approximation by one number, and the fastest exact attention."""

from typing import Any

from attn_dispatch.adapters.comfyui import install
from attn_dispatch.backends import Option
from attn_dispatch.router import AttentionRouter, Route
from comfy_api.latest import io

from ..approximation import ApproximationConfig
from ..exact import BACKENDS, exact_backend
from ..measured import PROBED_QUERIES, Measured
from ..progress import say_on_node
from ..schema import ATTENTION_MENU, config_from, inputs_of, node_schema, widget
from ..stacking import APPROXIMATE, NATIVE, install_below

_MODEL = "The diffusion model; the input itself is left as it is."
_ADVANCED = ("tile", "exact_above_sigma", "layer_start", "layer_end", "references")


class ApproximateAttention(io.ComfyNode):  # type: ignore[misc]
    """Faster attention by one number, without training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        inputs = inputs_of(ApproximationConfig, advanced=_ADVANCED)
        inputs[0].display_mode = io.NumberDisplay.slider
        return node_schema(
            node_id="ApproximateAttention",
            display_name="Approximate Attention",
            category=ATTENTION_MENU,
            description="Makes large images faster: attention stays exact for text, for near image patches and for the "
            "distant ones that matter, and averages the rest. No training. Where it would not be faster, or the model "
            "does not tell where its image tokens lie, attention stays exact and the Attention Report says so.",
            search_aliases=[
                "fast attention",
                "speed up",
                "near-far",
                "sparse attention",
                "flux",
                "high resolution",
                "accelerate",
            ],
            inputs=[io.Model.Input("model", tooltip=_MODEL), *inputs],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with approximate attention; link it to a sampler or to further attention nodes.",
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Any, **options: Any) -> io.NodeOutput:
        """Put the approximation on a clone of the model."""
        config = config_from(ApproximationConfig, options)
        handler = Measured(config.router(), PROBED_QUERIES if config.measure_error else 0)
        return io.NodeOutput(install(model, handler, key=APPROXIMATE))


class AttentionBackend(io.ComfyNode):  # type: ignore[misc]
    """The fastest exact attention that is installed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        choice = Option(
            "Which attention computes what no approximation answers. auto = the fastest that works on this device; the "
            "names with 8 or fewer bits (sage, flash_fp8, ck_int8) trade a little precision. One that cannot run here "
            "leaves the work to PyTorch, and the node says why.",
            choices=BACKENDS,
        )
        return node_schema(
            node_id="AttentionBackend",
            display_name="Attention Backend",
            category=ATTENTION_MENU,
            description="Picks the attention library for this model only, tries it once and shows on the node what it "
            "came to. Works together with the approximating nodes, before or behind them.",
            search_aliases=["sage attention", "flash attention", "xformers", "sdpa", "fast attention", "speed up"],
            inputs=[io.Model.Input("model", tooltip=_MODEL), widget("backend", "auto", choice)],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with this attention; link it to a sampler or further nodes.",
                ),
                io.String.Output("running", tooltip="What runs, in words, and why not what was asked for."),
            ],
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Any, backend: str) -> io.NodeOutput:
        """Put the chosen attention below everything else on a clone of the model."""
        exact = exact_backend(backend)
        label = exact.selection.label()
        say_on_node(label, cls.hidden.unique_id)
        handler = Measured(AttentionRouter([Route(exact)]))
        return io.NodeOutput(install_below(model, handler, NATIVE), label)
