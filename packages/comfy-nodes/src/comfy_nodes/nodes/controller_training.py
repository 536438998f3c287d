"""Phase 2: a controller learns, from whole images, where exact attention is worth its cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attn_dispatch.backends import option
from comfy_api.latest import io

from ..progress import say_on_node
from ..schema import ATTENTION_MENU, hosted, inputs_of, node_schema
from ..sockets import CONTROLLER, TRAINING_CONFIG
from .controller_files import DEFAULT_CONTROLLER
from .controller_runs import train_controller
from .distill_checkpoint import CheckpointPlace, check_path, fingerprints
from .training_config import unpack


@dataclass(frozen=True)
class ControllerTrainingSettings:
    """Inputs of the controller trainer."""

    steps: int = option(20, "Diffusion steps of every image.", 1, 10_000, 1)
    seed: int = option(0, "Seed of the first image's noise and of the controller's choices.", 0, 2**64 - 1, 1)
    cfg: float = option(1.0, "Guidance scale of every image.", 0, 100, 0.001)
    checkpoint_path: str = option(
        DEFAULT_CONTROLLER,
        "Folder of the controller: absolute, or within models/approximate_attention; an ending such as .pt is left "
        "out. If a training is there already, it goes on.",
    )
    training_iterations: int = option(
        100, "Updates of the controller for each entry of the latent batch.", 1, 100_000, 1
    )
    denoise: float = option(1.0, "Share of the schedule that is sampled.", 0, 1, 0.001)
    sigma_aware_training: bool = option(
        True, "On = the controller chooses anew in every diffusion step; off = once for a whole image."
    )
    rollouts: int = option(
        4,
        "Images sampled with students for each update, each with choices of its own (REINFORCE compares them); more "
        "make better updates and take longer.",
        2,
        64,
        1,
    )


class Flux2TTRControllerTrainer(io.ComfyNode):  # type: ignore[misc]
    """Trains a controller on images of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        samplers, schedulers = host_samplers()
        return node_schema(
            node_id="Flux2TTRControllerTrainer",
            display_name="Flux2TTRControllerTrainer",
            category=ATTENTION_MENU,
            description="Learns in which layers and diffusion steps exact attention is worth its cost, by sampling the "
            "same image with and without students. It learns from the outcome of tried choices alone (REINFORCE); "
            "the other methods are those of the command ttr train-controller. Shows both images while it learns. "
            "Needs students that are ready: train them first with Flux2TTRTrainer.",
            search_aliases=["distill", "distillation", "fast attention", "routing", "controller", "flux"],
            inputs=[
                io.Model.Input("model_original", tooltip="The model without students."),
                io.Model.Input(
                    "model_ttr", tooltip="The same model from Flux2TTRTrainer; its ready students are used."
                ),
                io.Conditioning.Input("positive", tooltip="The prompt of all images."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of all images."),
                io.Latent.Input("latent", tooltip="Size of the images; each entry of a batch is trained on in turn."),
                io.Vae.Input("vae", tooltip="Decodes the images that are shown and compared."),
                TRAINING_CONFIG.Input("training_config", tooltip="Weights of the image error, schedule and optimiser."),
                *inputs_of(ControllerTrainingSettings, "steps", "seed", "cfg"),
                hosted(
                    io.Combo.Input,
                    "sampler_name",
                    options=list(samplers),
                    default="euler",
                    tooltip="Sampler of every image.",
                ),
                hosted(
                    io.Combo.Input,
                    "scheduler",
                    options=list(schedulers),
                    default="normal",
                    tooltip="Spacing of the diffusion steps.",
                ),
                *inputs_of(ControllerTrainingSettings, "checkpoint_path", "training_iterations", "denoise"),
                *inputs_of(ControllerTrainingSettings, "sigma_aware_training"),
                *inputs_of(ControllerTrainingSettings, "rollouts", optional=True),
            ],
            outputs=[
                io.Image.Output("IMAGE_ORIGINAL", tooltip="The last images with exact attention."),
                io.Image.Output("IMAGE_PATCHED", tooltip="The same images as the trained controller makes them."),
                CONTROLLER.Output("CONTROLLER", tooltip="The controller; link it to Flux2TTRController."),
            ],
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, checkpoint_path: str | None = None) -> Any:
        """Look at the path alone; every other input keeps the host's own checks."""
        return check_path(checkpoint_path, DEFAULT_CONTROLLER)

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> Any:
        """Run again when the checkpoint was changed by something else."""
        return fingerprints(values.get("checkpoint_path"), default=DEFAULT_CONTROLLER)

    @classmethod
    def execute(
        cls,
        model_original: Any,
        model_ttr: Any,
        training_config: object,
        sampler_name: str,
        scheduler: str,
        **rest: Any,
    ) -> io.NodeOutput:
        """Train, and return the last images and the controller."""
        inputs = {name: rest.pop(name) for name in ("positive", "negative", "latent", "vae")}
        settings = ControllerTrainingSettings(**rest)
        trained = train_controller(
            model_original,
            model_ttr,
            inputs,
            settings,
            unpack(training_config),
            CheckpointPlace.named(settings.checkpoint_path, DEFAULT_CONTROLLER),
            (sampler_name, scheduler),
        )
        say_on_node(trained.text, cls.hidden.unique_id)
        return io.NodeOutput(trained.original, trained.patched, trained.controller)


def host_samplers() -> tuple[Sequence[str], Sequence[str]]:
    """Names of the host's samplers and schedulers; the defaults alone where it has none."""
    try:
        from comfy.samplers import KSampler
    except ImportError:
        return ("euler",), ("normal",)

    return KSampler.SAMPLERS, KSampler.SCHEDULERS
