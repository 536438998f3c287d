"""Inference with a trained controller: students answer where it lets them."""

from dataclasses import dataclass
from typing import Any, cast

from attn_dispatch.backends import option
from comfy_api.latest import io

from ..progress import say_on_node
from ..schema import ATTENTION_MENU, inputs_of, node_schema
from ..sockets import CONTROLLER
from .controller_files import PolicyMode, load_controller, routing_guard
from .distill_checkpoint import CheckpointPlace, check_path, fingerprints, load_trained, serve, serving_thresholds
from .distill_gate import faster


@dataclass(frozen=True)
class RoutingSettings:
    """Inputs of the controller node."""

    ttr_checkpoint_path: str = option(
        "", "Folder of the trained students: absolute, or within models/approximate_attention; older .pt files too."
    )
    controller_checkpoint_path: str = option(
        "", "Folder of the trained controller; not needed where one is linked below. Older .pt files too."
    )
    quality_speed: float = option(0.5, "0 = mostly exact attention, 1 = mostly students.", 0, 1, 0.001)
    policy_mode: str = option(
        "stochastic",
        "stochastic = draw each layer of each step by its probability, threshold = exact where it is high.",
        choices=("stochastic", "threshold"),
    )
    policy_temperature: float = option(
        1.0, "Above 1 stochastic choices get more random, towards 0 they become the threshold's.", 0.001, 10, 0.001
    )
    readiness_threshold: float = option(
        0.0,
        "Distance from exact attention up to which a student may serve; 0 = as when it was trained.",
        0,
        10,
        0.0001,
    )
    only_where_faster: bool = option(
        False,
        "Let students answer only where they should be faster than exact attention: large images, mostly.",
    )
    policy_seed: int = option(0, "Seed of the stochastic choices; the same seed makes the same image.", 0, 2**32 - 1, 1)


_SAVED = ("ttr_checkpoint_path", "controller_checkpoint_path", "quality_speed", "policy_mode", "policy_temperature")


class Flux2TTRController(io.ComfyNode):  # type: ignore[misc]
    """Lets a trained controller choose between exact attention and students."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return node_schema(
            node_id="Flux2TTRController",
            display_name="Flux2TTRController",
            category=ATTENTION_MENU,
            description="Samples with trained students where a trained controller lets them answer, per layer and "
            "diffusion step, and with exact attention elsewhere. Layers whose student is not ready stay exact. An "
            "Attention Report behind the sampler shows what ran.",
            search_aliases=["distill", "distillation", "fast attention", "speed up", "routing", "controller", "flux"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model; the input itself is left as it is."),
                *inputs_of(RoutingSettings, *_SAVED),
                CONTROLLER.Input(
                    "controller", optional=True, tooltip="A controller from its trainer; goes before the path."
                ),
                *inputs_of(RoutingSettings, "policy_seed", "readiness_threshold", "only_where_faster", optional=True),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model; link it to a sampler.")],
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(
        cls, ttr_checkpoint_path: str | None = None, controller_checkpoint_path: str | None = None
    ) -> Any:
        """Look at the paths alone; every other input keeps the host's own checks."""
        wrong = check_path(ttr_checkpoint_path)
        return wrong if wrong is not True else check_path(controller_checkpoint_path)

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> Any:
        """Run again when a checkpoint has changed."""
        return fingerprints(values.get("ttr_checkpoint_path"), values.get("controller_checkpoint_path"))

    @classmethod
    def execute(cls, model: Any, controller: Any = None, **values: Any) -> io.NodeOutput:
        """Put students and controller on a clone of the model."""
        settings = RoutingSettings(**values)
        found = CheckpointPlace.named(settings.ttr_checkpoint_path).require()
        students = load_trained(model, found, readiness=serving_thresholds(found, settings.readiness_threshold))
        ready = students.ready()
        used = controller or load_controller(CheckpointPlace.named(settings.controller_checkpoint_path))
        used.require(students.model.fingerprint, students.model.layers)
        guard = routing_guard(
            used,
            ready,
            quality_speed=settings.quality_speed,
            mode=cast(PolicyMode, settings.policy_mode),
            temperature=settings.policy_temperature,
            seed=settings.policy_seed,
        )
        say_on_node(f"{len(ready)} of {len(students.bank)} layers are ready", cls.hidden.unique_id)
        guards = (faster(students.bank), guard) if settings.only_where_faster else (guard,)
        return io.NodeOutput(serve(model, students, ready, guards))
