"""Phase 1: students learn from exact attention while images are sampled, and serve when they are ready."""

import logging
from typing import Any

from comfy_api.latest import io

from ..schema import ATTENTION_MENU, inputs_of, node_schema
from ..sockets import TRAINING_CONFIG
from .distill_checkpoint import CheckpointPlace, check_path, fingerprints
from .distill_runs import distill
from .distill_settings import DistillSettings, settings_from
from .training_config import KEY_ADVICE, TrainingParameters, api_key_input, unpack

logger = logging.getLogger(__name__)

DEFAULT_CHECKPOINT = "flux2_ttr.pt"
_MODEL = "The diffusion model; the input itself is left as it is."
_UNUSED = "Not used; older workflows link something here."
_SHARED = (
    "text_tokens_guess",
    "alpha_init",
    "training_query_token_cap",
    "replay_buffer_size",
    "replay_offload_cpu",
    "replay_max_mb",
    "train_steps_per_call",
)
_JUDGED = ("readiness_threshold", "readiness_min_updates", "enable_memory_reserve", "layer_start", "layer_end")
_NEW = ("student", "blocks", "distill_seed", "only_where_faster")
_COMPAT = ("query_chunk_size", "key_chunk_size", "text_tokens_guess", "replay_buffer_size", "cfg_scale")
_ALIASES = ("distill", "distillation", "fast attention", "speed up", "student", "train attention", "flux")


def _settings(*names: str) -> list[io.Input]:
    return inputs_of(DistillSettings, *names, advanced=tuple(name for name in names if name in _COMPAT))


def _outputs() -> list[io.Output]:
    return [
        io.Model.Output(display_name="MODEL", tooltip="The model; link it to a sampler. Sampling is what trains it."),
        io.Float.Output(
            "loss_value", tooltip="Mean loss of the latest finished sampling that trained; 0 before the first."
        ),
    ]


class Flux2TTRTrainer(io.ComfyNode):  # type: ignore[misc]
    """Trains students while images are sampled, or lets them serve."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        path = inputs_of(DistillSettings, "checkpoint_path")[0]
        path.default = DEFAULT_CHECKPOINT
        return node_schema(
            node_id="Flux2TTRTrainer",
            display_name="Flux2TTRTrainer",
            category=ATTENTION_MENU,
            description="Distils cheap stand-ins for the attention of a model, layer by layer, while a sampler behind "
            "this node makes images. A layer's student serves only once it is close enough to exact attention on "
            "queries it never learned from. What is learned is saved after every sampling, also when it is stopped.",
            search_aliases=list(_ALIASES),
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Latent.Input("latents", optional=True, tooltip=_UNUSED),
                io.Conditioning.Input("conditioning", optional=True, tooltip=_UNUSED),
                TRAINING_CONFIG.Input(
                    "training_config", optional=True, tooltip="Settings of the optimiser and the tracker."
                ),
                *_settings("steps", "training", "training_preview_ttr"),
                path,
                *_settings("feature_dim", "query_chunk_size", "key_chunk_size"),
                *_settings("landmark_fraction", "landmark_min", "landmark_max", *_SHARED, *_JUDGED),
                *_settings("cfg_scale", "min_swap_layers", "max_swap_layers", "inference_mixed_precision"),
                *_settings("controller_checkpoint_path"),
                *inputs_of(DistillSettings, *_NEW, optional=True),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, checkpoint_path: str | None = None, controller_checkpoint_path: str | None = None) -> Any:
        """Look at the paths alone; every other input keeps the host's own checks."""
        wrong = check_path(checkpoint_path, DEFAULT_CHECKPOINT)
        return wrong if wrong is not True else check_path(controller_checkpoint_path)

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> Any:
        """Run again when a checkpoint has changed, which it does with every sampling that trains."""
        return fingerprints(
            values.get("checkpoint_path"), values.get("controller_checkpoint_path"), default=DEFAULT_CHECKPOINT
        )

    @classmethod
    def execute(cls, model: Any, training_config: object = None, **values: Any) -> io.NodeOutput:
        """Put a training or a serving handler on a clone of the model."""
        settings = settings_from(values)
        found = CheckpointPlace.named(settings.checkpoint_path, DEFAULT_CHECKPOINT)
        return distill(model, settings, unpack(training_config), found, cls.hidden.unique_id)


class Flux2TTR(io.ComfyNode):  # type: ignore[misc]
    """The first version of the trainer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        parameters = {one.id: one for one in inputs_of(TrainingParameters)}
        parameters["comet_enabled"].default = True
        return node_schema(
            node_id="Flux2TTR",
            display_name="Flux2TTR",
            category=ATTENTION_MENU,
            description="The first version of Flux2TTRTrainer, for workflows that were saved with it. It trains and "
            "serves the same students.",
            search_aliases=list(_ALIASES),
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Latent.Input("latents", optional=True, tooltip=_UNUSED),
                io.Conditioning.Input("conditioning", optional=True, tooltip=_UNUSED),
                parameters["learning_rate"],
                *_settings("steps", "training", "training_preview_ttr"),
                parameters["comet_enabled"],
                parameters["comet_project_name"],
                parameters["comet_workspace"],
                api_key_input(),
                *_settings("checkpoint_path", "feature_dim", "query_chunk_size", "key_chunk_size"),
                *_settings("landmark_count", "text_tokens_guess", "alpha_init"),
                parameters["alpha_lr_multiplier"],
                parameters["phi_lr_multiplier"],
                *_settings(*_SHARED[2:]),
                parameters["huber_beta"],
                parameters["grad_clip_norm"],
                *_settings(*_JUDGED, "inference_mixed_precision"),
                *inputs_of(DistillSettings, *_NEW, optional=True),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
            is_deprecated=True,
        )

    @classmethod
    def validate_inputs(cls, checkpoint_path: str | None = None) -> Any:
        """Look at the path alone; every other input keeps the host's own checks."""
        return check_path(checkpoint_path)

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> Any:
        """Run again when the checkpoint has changed."""
        return fingerprints(values.get("checkpoint_path"), default=DEFAULT_CHECKPOINT)

    @classmethod
    def execute(cls, model: Any, comet_api_key: str = "", **values: Any) -> io.NodeOutput:
        """Put a training or a serving handler on a clone of the model."""
        if comet_api_key.strip():
            logger.warning("comet_api_key: %s", KEY_ADVICE)
        settings = settings_from(values)
        default = DEFAULT_CHECKPOINT if settings.training else ""
        found = CheckpointPlace.named(settings.checkpoint_path, default)
        parameters = unpack(dict.fromkeys(("loss_config", "optimizer_config", "logging_config"), values))
        return distill(model, settings, parameters, found, cls.hidden.unique_id)
