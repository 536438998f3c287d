"""The ``convert`` command: students and controllers from files of other programs into checkpoint folders, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A file of another program, or a checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="What to make: a folder from a file, a file from a folder.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Fingerprint of the model that it belongs to, if the file does not say."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the target holds.")] = False,
) -> None:
    """Turn a file into a checkpoint folder, or a folder into a file: flux2_ttr_v2 or flux2_ttr_controller_v1.

    Weights, settings, readiness and the optimiser's state go along. Nothing in a file is executed.
    """
    from ttr_distill.checkpoint import CheckpointError

    if target.exists() and not force:
        raise CheckpointError(f"{target} exists already; choose another target, or say --force")
    if source.is_dir():
        _to_file(source, target, model)
    else:
        _to_folder(source, target, model)


def _to_folder(source: Path, target: Path, model: str | None) -> None:
    from ttr_distill import legacy
    from ttr_distill.checkpoint import CheckpointError, save_checkpoint
    from ttr_distill.saved_students import save_students
    from ttr_distill.training.distiller import Distiller

    from ttr_controller.legacy import FORMAT, read_legacy_controller, trainer_state
    from ttr_controller.saved_policy import KIND

    payload = legacy.read_payload(source, legacy.FORMAT, FORMAT)
    legacy.check_model(source, payload, model)
    fingerprint = str(payload.get(legacy.MODEL_KEY) or model or "")
    if not fingerprint:
        raise CheckpointError(
            f"{source} does not say which model it belongs to; name the model's fingerprint with --model"
        )
    if payload["format"] == FORMAT:
        controller = read_legacy_controller(source)
        state = trainer_state(controller)
        save_checkpoint(target, state["tensors"], {"kind": KIND, **state["manifest"]}, fingerprint=fingerprint)
        typer.echo(f"controller: {controller.policy.layers} layers")
    else:
        found = legacy.read_legacy_students(source)
        distiller = Distiller(found.bank, found.readiness)
        distiller.load_state_dict(found.training)
        save_students(target, found.bank, found.readiness, distiller, fingerprint=fingerprint)
        typer.echo(f"students: {len(found.bank)} layers of {found.bank.heads} heads of width {found.bank.width}")
    typer.echo(f"checkpoint: {target.resolve()}")


def _to_file(source: Path, target: Path, model: str | None) -> None:
    from ttr_distill.checkpoint import load_checkpoint
    from ttr_distill.legacy import write_legacy_students
    from ttr_distill.saved_students import load_students

    from ttr_controller.legacy import LegacyController, write_legacy_controller
    from ttr_controller.saved_policy import KIND, load_policy

    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; what comes from a folder becomes a file")
    facts = load_checkpoint(source, fingerprint=model, groups=()).manifest
    fingerprint = str(facts["fingerprint"])
    if facts.get("kind") == KIND:
        policy = load_policy(source).policy
        write_legacy_controller(target, LegacyController(policy, {}, fingerprint=fingerprint))
        typer.echo(f"controller: {policy.layers} layers")
    else:
        saved = load_students(source, fingerprint=model, training=True)
        write_legacy_students(target, saved.bank, saved.readiness, saved.training, fingerprint=fingerprint)
        typer.echo(f"students: {len(saved.bank)} layers of {saved.bank.heads} heads of width {saved.bank.width}")
    typer.echo(f"file: {target.resolve()}")
