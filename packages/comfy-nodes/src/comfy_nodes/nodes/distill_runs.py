"""What the distillation nodes do with a model."""

import logging
from pathlib import Path
from typing import Any

from attn_dispatch import Guard
from attn_dispatch.adapters.comfyui import install
from comfy_api.latest import io
from ttr_distill import Distiller
from ttr_distill.adapters.comfyui import DistillHandler, check_writable, open_session
from ttr_distill.adapters.comfyui_model import ComfyModel, describe_model
from ttr_distill.adapters.comfyui_session import SessionPlan, saved_student
from ttr_distill.grad import training_mode
from ttr_distill.saved_students import save_students

from ..memory import reserve_memory
from ..progress import say_on_node
from .controller_files import load_controller, routing_guard
from .distill_checkpoint import TTR, CheckpointPlace, load_old, load_trained, serve
from .distill_gate import faster
from .distill_settings import DistillSettings, distill_config, readiness_config, student_config
from .distill_sinks import sink_maker
from .training_config import TrainingParameters

logger = logging.getLogger(__name__)


def distill(
    patcher: Any, settings: DistillSettings, parameters: TrainingParameters, found: CheckpointPlace, node_id: object
) -> io.NodeOutput:
    """Train or serve, as the settings say, and show on the node what came of it.

    Args:
        patcher: ComfyUI's ``ModelPatcher``; stays as it is.
        settings: Of the node.
        parameters: Of the optimiser and the tracker.
        found: The checkpoint.
        node_id: Where to show it.
    """
    run = train if settings.training else serve_trained
    model, loss, text = run(patcher, settings, parameters, found, node_id)
    said = "\n".join(part for part in (text, settings.warning) if part)
    say_on_node(said, node_id)
    if settings.warning:
        logger.warning("%s", settings.warning)
    return io.NodeOutput(model, loss)


def train(
    patcher: Any, settings: DistillSettings, parameters: TrainingParameters, found: CheckpointPlace, node_id: object
) -> tuple[Any, float, str]:
    """Make a clone of a model from whose samplings students learn; arguments as ``distill``.

    Returns:
        The clone, the loss of the latest training, and one line about it.
    """
    from comfy import model_management

    model = describe_model(patcher)
    layers = model.range(settings.layer_start, settings.layer_end, settings.streams)
    check_writable(found.folder)
    if found.old is not None:
        take_over(found.old, found.folder, model, settings)
    plan = SessionPlan(
        path=found.folder,
        model=model,
        layers=layers,
        student=student_config(saved_student(found.folder), settings),
        distill=distill_config(settings, parameters),
        readiness=readiness_config(settings),
        seed=settings.distill_seed,
        device=str(patcher.load_device),
    )
    session = open_session(patcher, plan, sink_maker(parameters, "distill", found.folder))

    def reserve(needed: int) -> None:
        reserve_memory(needed, patcher.load_device)

    def tell(text: str) -> None:
        say_on_node(text, node_id)

    handler = DistillHandler(
        session,
        settings.steps,
        check=model_management.throw_exception_if_processing_interrupted,
        tell=tell,
        reserve=reserve if settings.enable_memory_reserve else None,
    )
    return install(patcher, handler, key=TTR), session.loss or 0.0, session.summary()


def take_over(file: Path, folder: Path, model: ComfyModel, settings: DistillSettings) -> None:
    """Write what a checkpoint file of an older version holds as a checkpoint, its training included.

    Args:
        file: Of the older version; stays as it is.
        folder: Of the checkpoint.
        model: Which must be the one it was trained on.
        settings: Of the node.
    """
    old = load_old(file, model, readiness_config(settings))
    distiller = Distiller(old.bank, old.readiness, seed=settings.distill_seed)
    with training_mode():
        distiller.load_state_dict(old.training)
    save_students(folder, old.bank, old.readiness, distiller, fingerprint=model.fingerprint)


def serve_trained(
    patcher: Any, settings: DistillSettings, parameters: TrainingParameters, found: CheckpointPlace, node_id: object
) -> tuple[Any, float, str]:
    """Make a clone of a model in which trained students answer; arguments and result as ``train``."""
    del parameters, node_id
    found.require()
    students = load_trained(
        patcher,
        found,
        readiness=readiness_config(settings),
        config=None if found.old else student_config(saved_student(found.folder), settings),
    )
    wanted = students.model.range(settings.layer_start, settings.layer_end, "all")
    ready = students.ready(tuple(layer for layer in wanted if layer in students.bank))
    guards: tuple[Guard, ...] = (faster(students.bank),) if settings.only_where_faster else ()
    if settings.controller_checkpoint_path.strip():
        controller = load_controller(CheckpointPlace.named(settings.controller_checkpoint_path))
        controller.require(students.model.fingerprint, students.model.layers)
        guards = (*guards, routing_guard(controller, ready))
    text = "\n".join([f"{len(ready)} of {len(students.bank)} layers serve", *students.changed])
    served = serve(patcher, students, ready, guards, mixed_precision=settings.inference_mixed_precision)
    return served, students.loss(), text
