"""What the distillation nodes are set to, and the configurations of students and training that it means."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from attn_dispatch.backends import option
from ttr_distill import PRESETS, DistillConfig, ReadinessConfig, StudentConfig, preset
from ttr_distill.training import CaptureConfig, UpdateConfig

from .training_config import TrainingParameters

AUTOMATIC = "auto"
RECOMMENDED = "near_far"
"""Student of a new checkpoint where the user does not choose: of use untrained, and the closest to exact attention."""

OLD_THRESHOLD = 0.12
"""Default threshold of older nodes; students that pass it can destroy a picture."""

_COMPAT = "Kept for saved workflows; "
_FILE = (
    "Folder of the checkpoint: absolute, or within models/approximate_attention. A name ending in .pt, .pth or .ckpt "
)


@dataclass(frozen=True)
class DistillSettings:
    """Inputs of the distillation nodes; each node takes some of them, in its own order."""

    steps: int = option(512, "Training updates that this node may make, over all samplings behind it.", 0, 200_000, 1)
    training: bool = option(
        True, "On = learn from the exact attention while images are sampled; off = let ready students answer."
    )
    training_preview_ttr: bool = option(
        True, "While training, show what the ready students make; off = the image is the exact one."
    )
    checkpoint_path: str = option(
        "",
        f"{_FILE}is read as an older checkpoint if there is such a file; what is learned goes to a folder beside it.",
    )
    feature_dim: int = option(256, "Students with a feature network: number of features.", 256, 8192, 256)
    query_chunk_size: int = option(256, f"{_COMPAT}the operators choose their own chunks.", 1, 4096, 1)
    key_chunk_size: int = option(1024, f"{_COMPAT}the operators choose their own chunks.", 1, 8192, 1)
    landmark_fraction: float = option(
        0.08, "Students with landmarks: share of the image tokens that are attended exactly.", 0.01, 0.5, 0.001
    )
    landmark_min: int = option(64, "Students with landmarks: at least so many image tokens.", 1, 1024, 1)
    landmark_max: int = option(
        0,
        "Students with landmarks: at most so many image tokens; 0 = no limit, which is slow for large images.",
        0,
        2048,
        1,
    )
    landmark_count: int = option(128, "Students with landmarks: so many image tokens are attended exactly.", 1, 1024, 1)
    text_tokens_guess: int = option(
        77, f"{_COMPAT}where the text tokens lie is known from the model, and all of them stay exact.", 0, 1024, 1
    )
    alpha_init: float = option(0.1, "Students with two branches: how they are blended at first.", 0, 10, 0.001)
    training_query_token_cap: int = option(128, "Queries of an attention call that are learned from.", 1, 4096, 1)
    replay_buffer_size: int = option(
        8, f"{_COMPAT}replay_max_mb alone limits what is kept, shared fairly between the layers.", 1, 4096, 1
    )
    replay_offload_cpu: bool = option(True, "Keep the recorded attention calls in main memory instead of the GPU's.")
    replay_max_mb: int = option(768, "Memory for recorded attention calls, in MiB.", 64, 65536, 1)
    train_steps_per_call: int = option(1, "Training updates after each recorded attention call.", 1, 32, 1)
    readiness_threshold: float = option(
        OLD_THRESHOLD,
        "Distance from exact attention up to which a student may serve, on queries it never learned from. 0.12, the "
        "default of older versions, is read as 0.005, since students that pass 0.12 can destroy a picture; any other "
        "number is taken as it is.",
        0,
        10,
        0.0001,
    )
    readiness_min_updates: int = option(24, "Measurements of a layer before its student can be ready.", 0, 100_000, 1)
    enable_memory_reserve: bool = option(
        False, "Ask ComfyUI to free the memory that training needs, before each sampling."
    )
    layer_start: int = option(-1, "First block that learns; -1 = from the beginning.", -1, 512, 1)
    layer_end: int = option(-1, "Last block that learns; -1 = to the end.", -1, 512, 1)
    cfg_scale: float = option(1.0, f"{_COMPAT}the scale is read from the sampler.", 0, 100, 0.001)
    min_swap_layers: int = option(1, "Layers that learn in a diffusion step: at least.", 0, 512, 1)
    max_swap_layers: int = option(-1, "Layers that learn in a diffusion step: at most; -1 = all.", -1, 512, 1)
    inference_mixed_precision: bool = option(
        True, "Multiply the feature networks of students in bfloat16 where the device is faster at it, when they serve."
    )
    controller_checkpoint_path: str = option(
        "", "Folder of a trained controller that decides where students serve; empty = wherever they are ready."
    )
    student: str = option(
        AUTOMATIC,
        f"Which student learns. auto = what the checkpoint holds, {RECOMMENDED} in a new one.",
        choices=(AUTOMATIC, *PRESETS),
    )
    blocks: str = option(
        "single",
        "Which blocks have students: single = the single-stream blocks where the model has them; all = every block.",
        choices=("single", "all"),
    )
    only_where_faster: bool = option(
        False,
        "Let students answer only where they should be faster than exact attention: large images, mostly.",
    )
    distill_seed: int = option(
        0, "Which queries, layers and samples are drawn, and the first weights.", 0, 2**32 - 1, 1
    )

    @property
    def streams(self) -> Literal["single", "all"]:
        """Which blocks have students."""
        return cast(Literal["single", "all"], self.blocks)

    @property
    def warning(self) -> str | None:
        """What a user should know of these settings."""
        if self.readiness_threshold == OLD_THRESHOLD:
            return f"readiness_threshold {OLD_THRESHOLD}, the old default, is read as {ReadinessConfig().threshold}"
        if self.readiness_threshold > ReadinessConfig().partial_threshold:
            return f"students that pass readiness_threshold {self.readiness_threshold:g} can destroy a picture"
        return None


def student_config(saved: StudentConfig | None, settings: DistillSettings) -> StudentConfig:
    """Choose the student and give it those settings that it has; others are the checkpoint's.

    Args:
        saved: What the checkpoint holds; ``None`` without one.
        settings: The node's.
    """
    held = None if saved is None else saved.preset
    name = settings.student if settings.student != AUTOMATIC else held or RECOMMENDED
    base = saved if saved is not None and name == held else preset(name)
    wanted = {
        "feature_dim": settings.feature_dim,
        "landmark_fraction": settings.landmark_fraction,
        "landmark_minimum": settings.landmark_min,
        "landmark_maximum": settings.landmark_max,
        "alpha_init": min(1.0, settings.alpha_init),
    }
    return with_settings(base, **wanted)


def with_settings(config: StudentConfig, **wanted: object) -> StudentConfig:
    """Change those settings of a student that it has; others are passed over."""
    known = {one.name for one in fields(config.settings)}
    return StudentConfig.from_dict(config.to_dict() | {key: value for key, value in wanted.items() if key in known})


def readiness_config(settings: DistillSettings) -> ReadinessConfig:
    """Make the thresholds."""
    default = ReadinessConfig()
    if settings.readiness_threshold in (0.0, OLD_THRESHOLD):
        return ReadinessConfig(minimum_updates=settings.readiness_min_updates)
    threshold = settings.readiness_threshold
    return ReadinessConfig(
        threshold=threshold,
        partial_threshold=max(threshold, default.partial_threshold),
        minimum_updates=settings.readiness_min_updates,
    )


def distill_config(settings: DistillSettings, parameters: TrainingParameters) -> DistillConfig:
    """Make the settings of training."""
    most = None if settings.max_swap_layers < 0 else max(settings.max_swap_layers, settings.min_swap_layers)
    return DistillConfig(
        capture=CaptureConfig(query_cap=settings.training_query_token_cap, offload=settings.replay_offload_cpu),
        update=UpdateConfig(
            learning_rate=parameters.learning_rate * max(parameters.phi_lr_multiplier, 1e-6),
            alpha_rate_factor=parameters.alpha_lr_multiplier / max(parameters.phi_lr_multiplier, 1e-6),
            huber_beta=parameters.huber_beta,
            clip_norm=parameters.grad_clip_norm,
        ),
        replay_bytes=settings.replay_max_mb * 2**20,
        train_steps_per_call=settings.train_steps_per_call,
        min_swap_layers=settings.min_swap_layers,
        max_swap_layers=most,
        preview=settings.training_preview_ttr,
    )


def settings_from(values: Mapping[str, Any]) -> DistillSettings:
    """Read the settings from a node's inputs; inputs that are none of them are passed over."""
    known = {one.name for one in fields(DistillSettings)}
    found = {name: value for name, value in values.items() if name in known}
    if "landmark_count" in values:
        found["landmark_min"] = found["landmark_max"] = values["landmark_count"]
    return DistillSettings(**found)
