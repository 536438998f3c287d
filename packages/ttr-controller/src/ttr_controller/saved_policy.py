"""A trained policy, or a training to go on with, as a checkpoint folder: safetensors and manifest, whole or absent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from attn_dispatch.call import LayerKey
from torch import Tensor
from ttr_distill.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.trainer import ControllerTrainer
from ttr_controller.trainer_state import TrainerManifest, TrainerState, with_prefix

KIND = "controller"


@dataclass(frozen=True)
class SavedPolicy:
    """A policy ready to serve.

    Attributes:
        policy: The best policy of the training, in eval mode.
        layers: Layers that its logits belong to.
        eligible: ``[L]`` bool, layers whose student was ready when it was trained.
        updates: Updates of the training.
        error: Error of the policy on the validation images; ``None`` if nothing was validated.
    """

    policy: RoutingPolicy
    layers: tuple[LayerKey, ...]
    eligible: Tensor
    updates: int
    error: float | None


def save_trainer(path: Path | str, trainer: ControllerTrainer, *, fingerprint: str | None = None) -> Path:
    """Save a training: policy, optimizer, baseline, counters and the best policy so far.

    Random draws depend on the seed and the counters alone, so there is no further state to save.

    Args:
        path: The checkpoint's folder.
        trainer: The training.
        fingerprint: Identity of the model that the policy was trained on.

    Raises:
        OSError: The disk refuses; the save before it still loads.
    """
    state = trainer.state_dict()
    return save_checkpoint(path, state["tensors"], {"kind": KIND, **state["manifest"]}, fingerprint=fingerprint)


def load_trainer(path: Path | str, trainer: ControllerTrainer, *, fingerprint: str | None = None) -> None:
    """Let a trainer go on from what ``save_trainer`` left; settings are those of the trainer.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of another model, or of another training.
    """
    state = read_state(path, fingerprint=fingerprint)
    try:
        trainer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} does not fit: {error}") from error


def load_policy(path: Path | str, *, fingerprint: str | None = None) -> SavedPolicy:
    """Load the best policy of a training; its last one if nothing was validated.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of another model, or holds no controller.
    """
    state = read_state(path, fingerprint=fingerprint)
    tensors, manifest = state["tensors"], state["manifest"]
    layers = tuple(LayerKey.parse(name) for name in manifest["layers"])
    known = {field.name for field in fields(PolicyConfig)}
    unknown = sorted(set(manifest["policy"]) - known)
    if unknown:
        raise CheckpointError(f"checkpoint {path} has policy settings this version does not know: {', '.join(unknown)}")
    config = PolicyConfig(**manifest["policy"])  # type: ignore[arg-type]
    policy = RoutingPolicy(len(layers), config, seed=0, actions=manifest["actions"])
    policy.load_state_dict(with_prefix(tensors, "best.") or with_prefix(tensors, "policy."))
    eligible = torch.tensor(manifest["eligible"], dtype=torch.bool)
    return SavedPolicy(policy.eval(), layers, eligible, manifest["updates"], manifest["best_error"])


def read_state(path: Path | str, *, fingerprint: str | None = None) -> TrainerState:
    """Read what ``ControllerTrainer.load_state_dict`` takes.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of another model, or holds no controller.
    """
    saved = load_checkpoint(path, fingerprint=fingerprint)
    missing = sorted(TrainerManifest.__required_keys__ - set(saved.manifest))
    if saved.manifest.get("kind") != KIND or missing:
        raise CheckpointError(f"checkpoint {path} holds no controller of this version")
    return {"tensors": dict(saved.tensors), "manifest": cast("TrainerManifest", saved.manifest)}
