"""The ``distill`` command: Phase 1 on the embedded teacher or on a real model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ttr_controller.cli.distill_options import (
    Budget,
    Calibrate,
    Device,
    Gate,
    Guidance,
    Height,
    Images,
    ModelDtype,
    ModelName,
    OffloadTo,
    Out,
    PromptFile,
    Queries,
    Rate,
    Replay,
    Reserve,
    SaveEvery,
    Seed,
    SessionOptions,
    Setting,
    Share,
    Steps,
    Student,
    TrainSteps,
    Width,
)
from ttr_controller.cli.tracking import Comet, Trackio, open_trackers

if TYPE_CHECKING:
    from ttr_distill.distributed import World
    from ttr_distill.image_gate import ImageGate
    from ttr_distill.metrics import QueuedSink
    from ttr_distill.session import DistillSession, ImageSampler, SessionConfig
    from ttr_distill.student import StudentConfig

DEFAULT_OUT = Path("ttr-quickstart")


def distill(
    model: ModelName = None,
    prompts: PromptFile = None,
    out: Out = DEFAULT_OUT,
    student: Student = "near_far",
    setting: Setting = None,
    images: Images = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    calibrate: Calibrate = None,
    train_steps: TrainSteps = None,
    queries: Queries = None,
    learning_rate: Rate = None,
    replay_mb: Replay = None,
    save_every: SaveEvery = None,
    sharing: Share = None,
    offload: OffloadTo = None,
    dtype: ModelDtype = None,
    image_gate: Gate = None,
    reserve_memory: Reserve = False,
    device: Device = "auto",
    budget: Budget = None,
    seed: Seed = 0,
    comet: Comet = False,
    trackio: Trackio = False,
) -> None:
    """Phase 1: distil a student for every attention layer while the model samples; resumable.

    With no more than `--out`, `--student`, `--device`, `--budget` and `--seed` this is the first phase of a quickstart
    on the embedded teacher, and `quickstart`, `train-controller` and `sample` go on in the same folder. Anything else,
    such as `--model` or `--prompts`, makes a session of its own: `students/`, `distill.jsonl` and, with `--calibrate`,
    `captures/`. `torchrun --no-python --nproc-per-node=N ttr distill ...` shares the work over N processes.
    """
    from ttr_distill.comet_metrics import DistillMetricNames

    options = SessionOptions(
        model, prompts, images, steps, height, width, guidance, calibrate, train_steps, queries, learning_rate,
        replay_mb, save_every, sharing, offload, dtype, image_gate, reserve_memory, tuple(setting) if setting else None,
    )  # fmt: skip
    facts = {"phase": "distill", "student": student, "seed": seed, **asdict(options)}
    trackers = open_trackers(DistillMetricNames, out, facts, comet=comet, trackio=trackio)
    if options.any:
        from ttr_controller.pipeline.settings import RunError

        if budget is not None:
            raise RunError("--budget is for the quickstart's own run; say --images for a session")
        checkpoint = _session(options, out, student, device, seed, trackers)
    else:
        checkpoint = _first_phase(out, student, device, 3.5 if budget is None else budget, seed, trackers)
    if checkpoint is not None:
        show_students(checkpoint)


def show_students(checkpoint: Path, console: Console | None = None) -> None:
    """Print a row per layer: held-out distances, measurements and readiness."""
    from ttr_controller.pipeline.showing import describe_checkpoint

    _, rows = describe_checkpoint(checkpoint)
    table = Table("layer", "held-out cosine distance", "relative L2", "measured", "level")
    for row in rows:
        table.add_row(*row)
    shown = console or Console()
    shown.print(table)
    ready = sum(row[-1] == "ready" for row in rows)
    shown.print(f"{ready} of {len(rows)} layers ready; students: {checkpoint.resolve()}", soft_wrap=True)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts: a JSON file with a list of strings, or a text file with one a line; empty lines are left out.

    Raises:
        RunError: There are none, or the file is neither.
        OSError: The file cannot be read.
    """
    from ttr_controller.pipeline.settings import RunError

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} is no file of prompts: {error}") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise RunError(f"{path} must hold a list of strings")
    prompts = tuple(prompt.strip() for prompt in found if prompt.strip())
    if not prompts:
        raise RunError(f"{path} holds no prompt")
    return prompts


def _first_phase(
    out: Path, student: str, device: str, budget: float, seed: int, trackers: Sequence[QueuedSink]
) -> Path:
    from ttr_controller.cli.progress import phase_progress
    from ttr_controller.pipeline.quickstart import run_phases
    from ttr_controller.pipeline.run_directory import RunDirectory
    from ttr_controller.pipeline.settings import QuickstartSettings, resolve_device

    settings = QuickstartSettings(preset=student, device=resolve_device(device), budget_minutes=budget, seed=seed)
    run = RunDirectory.open_or_create(out, settings)
    with phase_progress(Console(stderr=True)) as progress:
        run_phases(run, ("distillation", "fidelity"), progress, trackers=trackers)
    return run.students


def _session(
    options: SessionOptions, out: Path, student: str, device: str, seed: int, trackers: Sequence[QueuedSink]
) -> Path | None:
    from ttr_distill.distributed import joined

    from ttr_controller.cli.progress import phase_progress
    from ttr_controller.pipeline.settings import resolve_device

    with joined(resolve_device(device)) as world:
        session = open_session(options, out, student, world, seed, trackers)
        if not world.main:
            session.run()
            return None
        with phase_progress(Console(stderr=True)) as progress:
            bar = progress.start("distil a student per layer", 1.0)
            done_before = 0.0

            def tell(done: int, of: int) -> None:
                nonlocal done_before
                progress.advance(bar, done / of - done_before)
                done_before = done / of

            session.run(tell)
            progress.finish(bar)
        return session.students


def open_session(
    options: SessionOptions,
    out: Path,
    student: str,
    world: World,
    seed: int,
    trackers: Sequence[QueuedSink] = (),
) -> DistillSession:
    """Load the model and make or reopen the session that the options describe.

    Raises:
        RunError: An option does not fit; the message says which.
        CheckpointError: The folder holds another session, or a damaged one.
    """
    from ttr_distill.session import DistillSession
    from ttr_distill.training.reservation import reserve_device_memory

    from ttr_controller.pipeline.settings import RunError

    try:
        config = _session_config(options, _student(student, options.settings or ()), seed)
        prompts = read_prompts(options.prompts) if options.prompts is not None else None
        if options.model is None:
            sampler, fingerprint, own = _embedded(options, str(world.device))
        else:
            sampler, fingerprint, own = _real(options, options.model, str(world.device))
        if prompts is None and not own:
            raise RunError(f"say with --prompts FILE what {options.model} shall draw while its students learn")
        sampling = ("steps", "height", "width", "guidance", "dtype")
        about = {"model": options.model or "embedded", **{name: getattr(options, name) for name in sampling}}
        return DistillSession(
            out,
            sampler,
            prompts or own,
            config,
            fingerprint=fingerprint,
            about=about,
            world=world,
            trackers=trackers,
            device=world.device,
            reserve=partial(reserve_device_memory, device=world.device) if options.reserve_memory else None,
        )
    except ImportError as error:
        raise RunError(str(error)) from error
    except ValueError as error:
        # Out of range or misspelt: what a user can mend; a damaged folder keeps its own kind of error.
        from ttr_distill.checkpoint import CheckpointError

        if isinstance(error, RunError | CheckpointError):
            raise
        raise RunError(str(error)) from error


def _student(name: str, settings: Sequence[str]) -> StudentConfig:
    from ttr_distill.student import StudentConfig, preset

    from ttr_controller.pipeline.settings import RunError

    values = preset(name).to_dict()
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or key not in values or key == "preset":
            known = ", ".join(sorted(set(values) - {"preset"}))
            raise RunError(f"--set {setting}: give name=value with a setting of {name!r}: {known}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return StudentConfig.from_dict(values)


def _image_gate(options: SessionOptions) -> ImageGate | None:
    """What is asked of images: of the embedded teacher's with prompts that nothing is learned from."""
    from ttr_distill.image_gate import ImageGate
    from ttr_distill.tiny import heldout_prompts

    if options.image_gate is None:
        return None
    own = options.model is None and options.prompts is None
    return ImageGate(options.image_gate, prompts=heldout_prompts() if own else ())


def _session_config(options: SessionOptions, student: StudentConfig, seed: int) -> SessionConfig:
    from ttr_distill.session import SessionConfig
    from ttr_distill.training import CaptureConfig, DistillConfig, UpdateConfig
    from ttr_distill.training.calibration import CalibrateConfig

    defaults = DistillConfig()
    queries = options.queries or defaults.capture.query_cap
    distill = DistillConfig(
        capture=CaptureConfig(query_cap=queries if options.calibrate is None else 4 * queries),
        update=UpdateConfig(learning_rate=options.learning_rate or defaults.update.learning_rate),
        replay_bytes=defaults.replay_bytes if options.replay_mb is None else options.replay_mb * 2**20,
        train_steps_per_call=defaults.train_steps_per_call if options.train_steps is None else options.train_steps,
        # Every layer learns in every step, as many as there are.
        min_swap_layers=sys.maxsize,
    )
    return SessionConfig(
        student,
        distill,
        images=options.images or 16,
        seed=seed,
        save_every=options.save_every or 1,
        calibrate=None if options.calibrate is None else CalibrateConfig(options.calibrate, queries),
        sharing=options.sharing or "layers",
        image_gate=_image_gate(options),
    )


def _embedded(options: SessionOptions, device: str) -> tuple[ImageSampler, str, tuple[str, ...]]:
    from ttr_distill.tiny import TinySampler, load_teacher, training_prompts

    from ttr_controller.pipeline.settings import RunError

    height, width = options.height or 128, options.width or 128
    if height % 4 or width % 4:
        raise RunError(f"the embedded teacher draws multiples of 4 pixels, got {height} x {width}")
    if options.offload is not None or options.dtype is not None:
        raise RunError("--offload and --dtype are for a real model; say which with --model")
    teacher = load_teacher(device)
    sampler = TinySampler(
        teacher,
        rows=height // 4,
        columns=width // 4,
        steps=options.steps or 8,
        guidance=3.0 if options.guidance is None else options.guidance,
    )
    return sampler, teacher.fingerprint, training_prompts()


def _real(options: SessionOptions, model: str, device: str) -> tuple[ImageSampler, str, tuple[str, ...]]:
    import torch
    from ttr_distill.adapters.diffusers_pipeline import (
        PipelineSampler,
        load_pipeline,
        model_fingerprint,
        place_pipeline,
    )

    from ttr_controller.pipeline.settings import RunError

    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise RunError(f"there is no model at {model}")
    pipeline = load_pipeline(
        str(Path(model).expanduser()) if model.startswith("~") else model,
        dtype=getattr(torch, options.dtype or "bfloat16"),
    )
    fingerprint = model_fingerprint(pipeline.transformer)
    place_pipeline(pipeline, device, options.offload or "none")
    sampler = PipelineSampler(
        pipeline,
        height=options.height or 1024,
        width=options.width or 1024,
        steps=options.steps or 20,
        guidance=options.guidance,
        decode=False,
    )
    return sampler, fingerprint, ()
