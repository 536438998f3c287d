"""The ``sample`` command: one picture with what a run learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    prompt: Annotated[str, typer.Argument(help='What to draw, e.g. "fox on blue".')],
    run_folder: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")] = Path("ttr-quickstart"),
    quality_speed: Annotated[
        float, typer.Option("--quality-speed", min=0.0, max=1.0, help="0 = mostly exact attention, 1 = mostly student.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("sample.png"),
    policy_mode: Annotated[
        str,
        typer.Option("--policy-mode", help="**threshold**: the likelier choice; **stochastic**: drawn, by the seed."),
    ] = "threshold",
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.001, help="Spreads or sharpens the odds of stochastic.")
    ] = 1.0,
    steps: Annotated[bool, typer.Option("--steps", help="Also print what was chosen in every step.")] = False,
) -> None:
    """Draw one picture, the learned policy deciding which layers and steps use the student.

    Prints how far the picture is from the teacher's own and what ran how often.
    """
    from ttr_controller.pipeline.serving import draw

    drawn = draw(run_folder, prompt, quality_speed, seed, out, policy_mode=policy_mode, temperature=temperature)
    typer.echo(f"picture: {out.resolve()}")
    for line in [*drawn.lines(), *(drawn.routing if steps else [])]:
        typer.echo(line)
