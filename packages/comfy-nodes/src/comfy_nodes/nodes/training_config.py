"""Settings that both phases of training share, as one node and one dictionary."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from attn_dispatch.backends import Option, option, options_of
from comfy_api.latest import io

from ..schema import ATTENTION_MENU, inputs_of, node_schema, widget
from ..sockets import TRAINING_CONFIG

logger = logging.getLogger(__name__)

KEY_ADVICE = (
    "the key in the workflow is not used; set the environment variable COMET_API_KEY, or Comet's own config file"
)
_WEIGHT = "Controller: weight in the image error of "


@dataclass(frozen=True)
class TrainingParameters:
    """Settings of both phases, in the order of the node's inputs; the key of a tracker is no setting."""

    rmse_weight: float = option(1.0, f"{_WEIGHT}the difference between the latents.", 0, 1000, 0.001)
    cosine_weight: float = option(1.0, f"{_WEIGHT}the angle between the latents.", 0, 1000, 0.001)
    lpips_weight: float = option(0.0, f"{_WEIGHT}LPIPS; needs the package lpips.", 0, 1000, 0.001)
    dreamsim_weight: float = option(0.0, f"{_WEIGHT}DreamSim; needs the package dreamsim.", 0, 1000, 0.001)
    hps_weight: float = option(
        0.0, f"{_WEIGHT}the loss of human preference (HPSv2); needs open_clip and its weights.", 0, 1000, 0.001
    )
    biqa_quality_weight: float = option(
        0.0, f"{_WEIGHT}the loss of technical quality; needs the package pyiqa.", 0, 1000, 0.001
    )
    biqa_aesthetic_weight: float = option(
        0.0, f"{_WEIGHT}the loss of aesthetic score; needs the package pyiqa.", 0, 1000, 0.001
    )
    reward_baseline_quality_floor: float = option(
        -0.3,
        "Kept for saved workflows. Rollouts of one image are compared with each other, which needs no floor.",
        -10,
        1,
        0.001,
    )
    huber_beta: float = option(
        0.05, "Distillation: where the smooth L1 loss turns from square to linear.", 1e-6, 10, 1e-4
    )
    learning_rate: float = option(1e-4, "Step size of the optimiser, in both phases.", 1e-7, 1, 1e-7)
    grad_clip_norm: float = option(1.0, "Largest norm of a gradient, in both phases; 0 = no limit.", 0, 100, 0.001)
    alpha_lr_multiplier: float = option(
        5.0, "Distillation: the blend of a student's branches learns so many times faster.", 0, 100, 0.001
    )
    phi_lr_multiplier: float = option(
        1.0, "Distillation: the feature networks learn so many times faster.", 0, 100, 0.001
    )
    target_ttr_ratio: float = option(
        0.7, "Controller: share of the attention calls that students should answer.", 0, 1, 0.001
    )
    lambda_eff: float = option(
        1.0, "Controller: price of attention cost; 1 = what saving all attention costs in image error.", 0, 100, 0.001
    )
    lambda_entropy: float = option(0.1, "Controller: reward for staying undecided, so that it explores.", 0, 1, 0.001)
    gumbel_temperature_start: float = option(
        1.0, "Controller: randomness of its choices in the first iteration.", 1e-4, 10, 0.001
    )
    gumbel_temperature_end: float = option(
        0.5, "Controller: randomness of its choices in the last iteration.", 1e-4, 10, 0.001
    )
    warmup_steps: int = option(0, "Kept for saved workflows; nothing reads it.", 0, 1_000_000, 1)
    comet_enabled: bool = option(
        False, "Also send metrics to Comet. They are always written to metrics.jsonl in the checkpoint's folder."
    )
    comet_project_name: str = option("ttr-distillation", "Comet: name of the project.")
    comet_workspace: str = option("", "Comet: workspace; empty = the default of your account.")
    comet_experiment: str = option("", "Comet: key of the experiment to continue; empty = a new one.")
    log_every: int = option(10, "Updates or iterations between two records of metrics.", 1, 1_000_000, 1)

    def __post_init__(self) -> None:
        for known in options_of(self):
            value = getattr(self, known.name)
            if isinstance(known.default, float) and not math.isfinite(value):
                raise ValueError(f"{known.name} must be finite, got {value}")


SECTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "loss_config": (
            "rmse_weight",
            "cosine_weight",
            "lpips_weight",
            "dreamsim_weight",
            "hps_weight",
            "biqa_quality_weight",
            "biqa_aesthetic_weight",
            "reward_baseline_quality_floor",
            "huber_beta",
        ),
        "optimizer_config": ("learning_rate", "grad_clip_norm", "alpha_lr_multiplier", "phi_lr_multiplier"),
        "schedule_config": (
            "target_ttr_ratio",
            "lambda_eff",
            "lambda_entropy",
            "gumbel_temperature_start",
            "gumbel_temperature_end",
            "warmup_steps",
        ),
        "logging_config": (
            "comet_enabled",
            "comet_project_name",
            "comet_workspace",
            "comet_experiment",
            "log_every",
        ),
    }
)
"""Sections of the dictionary that the node gives, and what stands in them."""


def pack(parameters: TrainingParameters) -> dict[str, dict[str, object]]:
    """Make the dictionary of four sections."""
    return {section: {name: getattr(parameters, name) for name in names} for section, names in SECTIONS.items()}


def unpack(config: object, **defaults: object) -> TrainingParameters:
    """Read the dictionary; what is missing or no number keeps its default, as older nodes read it.

    Args:
        config: What is linked to ``training_config``; anything but a dictionary counts as empty.
        **defaults: Other defaults than the node's.
    """
    found: dict[str, Any] = dict(defaults)
    known = {one.name: one.type for one in fields(TrainingParameters)}
    for section, names in SECTIONS.items():
        values = config.get(section) if isinstance(config, Mapping) else None
        for name in names:
            value = values.get(name) if isinstance(values, Mapping) else None
            cast = known[name]
            if value is None or not isinstance(cast, type):
                continue
            try:
                read = cast(value)
            except (TypeError, ValueError):
                continue
            if not isinstance(read, float) or math.isfinite(read):
                found[name] = read
    return TrainingParameters(**found)


def api_key_input() -> io.Input:
    """The input of older workflows for a tracker's key; nothing reads it, and it warns."""
    advice = Option(f"Leave it empty: a workflow is shared with its images. If something stands here, {KEY_ADVICE}.")
    return widget("comet_api_key", "", advice, socketless=True, placeholder="not used: set COMET_API_KEY")


class Flux2TTRTrainingParameters(io.ComfyNode):  # type: ignore[misc]
    """Loss, optimiser, schedule and logging of training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        inputs = {one.id: one for one in inputs_of(TrainingParameters)}
        names = list(inputs)
        order = names.index("comet_project_name")
        return node_schema(
            node_id="Flux2TTRTrainingParameters",
            display_name="Flux2TTRTrainingParameters",
            category=ATTENTION_MENU,
            description="Settings that the distillation and the controller training share: loss, optimiser, schedule "
            "and logging. Link it to Flux2TTRTrainer or Flux2TTRControllerTrainer.",
            search_aliases=["distill", "distillation", "fast attention", "training settings"],
            inputs=[
                *(inputs[name] for name in names[:order]),
                api_key_input(),
                *(inputs[name] for name in names[order:]),
            ],
            outputs=[TRAINING_CONFIG.Output("training_config", tooltip="The settings, for the two trainers.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, comet_api_key: str = "", **values: Any) -> io.NodeOutput:
        """Pack the settings."""
        if comet_api_key.strip():
            logger.warning("comet_api_key: %s", KEY_ADVICE)
        return io.NodeOutput(pack(unpack(dict.fromkeys(SECTIONS, values))))
