"""Options of the ``distill`` command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

Sharing = Literal["layers", "images"]
Offload = Literal["none", "model", "sequential"]
Dtype = Literal["bfloat16", "float16", "float32"]

ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub name of a diffusers pipeline; the embedded teacher if left out."),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="Text file with a prompt a line, or JSON file with a list of strings.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the session; made if missing, continued if it holds one.")]
Student = Annotated[
    str, typer.Option("--student", "--preset", help="Preset of the students, e.g. **near_far**, **hkr**.")
]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the students, as `name=value`; may be repeated.")
]
Images = Annotated[int | None, typer.Option("--images", min=1, help="Images to learn from; 16 for a session.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps; 8, or 20 for a real model.")]
Height = Annotated[int | None, typer.Option("--height", min=1, help="Pixels; 128, or 1024 for a real model.")]
Width = Annotated[int | None, typer.Option("--width", min=1, help="Pixels; 128, or 1024 for a real model.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 3, or the pipeline's own.")]
Calibrate = Annotated[
    int | None,
    typer.Option("--calibrate", min=1, help="Record all calls to disk first, then learn in so many epochs from there."),
]
TrainSteps = Annotated[int | None, typer.Option("--train-steps", min=0, help="Updates after each captured call; 1.")]
Queries = Annotated[int | None, typer.Option("--queries", min=1, help="Training queries kept of a call; 128.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="Step of the optimiser; 0.001.")]
Replay = Annotated[int | None, typer.Option("--replay-mb", min=1, help="Budget of the replay in MiB; 768.")]
SaveEvery = Annotated[int | None, typer.Option("--save-every", min=1, help="Save after so many images; 1.")]
Share = Annotated[
    Sharing | None, typer.Option("--sharing", help="What processes started by `torchrun` divide: layers or images.")
]
OffloadTo = Annotated[Offload | None, typer.Option("--offload", help="Move weights to the device when they run.")]
ModelDtype = Annotated[Dtype | None, typer.Option("--dtype", help="Data type of a real model; bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Gate = Annotated[
    float | None,
    typer.Option(
        "--image-gate",
        help="Let students serve only if two images that were not learned from, drawn with them, lie no farther from "
        "the exact ones than this: relative L2 distance of the latents, e.g. `0.1`. Off if left out.",
    ),
]
Reserve = Annotated[
    bool,
    typer.Option(
        "--reserve-memory",
        help="Before every image, ask the device for the memory that the updates are estimated to need.",
    ),
]
Budget = Annotated[
    float | None, typer.Option("--budget", help="Minutes of a whole quickstart that this is part of; 3.5.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random draw.")]


@dataclass(frozen=True)
class SessionOptions:
    """What the command line says of a session; ``None`` = not said.

    Attributes:
        model: Folder or hub name of a pipeline; ``None`` is the embedded teacher.
        prompts: File of prompts.
        images: Images to learn from.
        steps: Sampling steps.
        height: Pixels.
        width: Pixels.
        guidance: Guidance scale.
        calibrate: Epochs over a recording.
        train_steps: Updates after each captured call.
        queries: Training queries kept of a call.
        learning_rate: Step of the optimiser.
        replay_mb: Budget of the replay in MiB.
        save_every: Save after so many images.
        sharing: What several processes divide.
        offload: How weights reach the device.
        dtype: Data type of the model.
        image_gate: How far images drawn with students may be from exact ones; ``None`` = they are not measured.
        reserve_memory: Ask for device memory before every image.
        settings: ``name=value`` of students.
    """

    model: str | None = None
    prompts: Path | None = None
    images: int | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    calibrate: int | None = None
    train_steps: int | None = None
    queries: int | None = None
    learning_rate: float | None = None
    replay_mb: int | None = None
    save_every: int | None = None
    sharing: Sharing | None = None
    offload: Offload | None = None
    dtype: Dtype | None = None
    image_gate: float | None = None
    reserve_memory: bool = False
    settings: tuple[str, ...] | None = None

    @property
    def any(self) -> bool:
        """Whether anything is said that a quickstart run does not know, or several processes were started."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1 or self != SessionOptions()
