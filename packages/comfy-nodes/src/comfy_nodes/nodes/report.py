"""What the attention nodes did in the latest run, as text and as a picture."""

from typing import Any

from attn_dispatch.adapters.comfyui import installed
from attn_dispatch.adapters.comfyui_override import INSTALLED
from comfy_api.latest import io, ui

from ..heat_map import draw, panels
from ..measured import RunFigures, figures_of
from ..progress import say_on_node
from ..report_text import full_text, summary
from ..schema import ATTENTION_MENU, node_schema


class AttentionReport(io.ComfyNode):  # type: ignore[misc]
    """Text and picture of the latest run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return node_schema(
            node_id="AttentionReport",
            display_name="Attention Report",
            category=ATTENTION_MENU,
            description="Shows what the attention nodes of this pack did in the latest sampling run of a model: what "
            "ran in which layer and step, how many milliseconds it took, why the rest stayed exact and, where it was "
            "measured, how far off it was.",
            search_aliases=["attention statistics", "profile", "benchmark", "fast attention", "heat map"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the sampler used, behind all attention nodes."),
                io.AnyType.Input(
                    "after", tooltip="The sampler's output, or anything made from it, so that the report comes last."
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="The whole report."),
                io.Image.Output("heat_map", tooltip="One row per layer, one column per step."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **linked: Any) -> float:
        """Tell ComfyUI to look every time: a model keeps its name while its figures change."""
        return float("nan")

    @classmethod
    def execute(cls, model: Any, after: Any) -> io.NodeOutput:
        """Read the figures."""
        named = _figures(model)
        text = full_text(named, _refused(model))
        say_on_node(summary(named), cls.hidden.unique_id)
        maps = [panel for name, figures in named.items() if figures.report.rows() for panel in panels(name, figures)]
        picture = draw(maps, summary(named))
        shown = {"text": (text,), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(text, picture, ui=shown)


def _figures(model: Any) -> dict[str, RunFigures]:
    """Figures of what is installed on a model, by key; the one that is asked first at the front."""
    known = {key: figures_of(handler) for key, handler in reversed(installed(model).items())}
    return {key: figures for key, figures in known.items() if figures is not None}


def _refused(model: Any) -> dict[str, dict[str, int]]:
    """How often each installation met a call that it could not understand."""
    options = model.model_options.get("transformer_options", {})
    return {key: dict(override.declines) for key, override in options.get(INSTALLED, {}).items()}
