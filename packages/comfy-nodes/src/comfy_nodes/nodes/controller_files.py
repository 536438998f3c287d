"""A trained routing policy: on disk, on the wire between nodes, and at work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from attn_dispatch import LayerKey
from ttr_controller.guard import PolicyGuard, threshold_from_quality_speed
from ttr_controller.legacy import read_legacy_controller
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.trainer_state import TrainerManifest, TrainerState, with_prefix
from ttr_distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint

from .distill_checkpoint import CheckpointPlace

KIND = "controller"
DEFAULT_CONTROLLER = "flux2_ttr_controller.pt"

PolicyMode = Literal["stochastic", "threshold"]


@dataclass(frozen=True)
class TrainedController:
    """What ``TTR_CONTROLLER`` links carry.

    Attributes:
        policy: Maps a diffusion step to one logit per layer, high = full attention.
        layers: The layers of the logits.
        fingerprint: Identity of the model it was trained on; ``None`` if its file does not say.
        source: Where it comes from, for messages.
    """

    policy: RoutingPolicy
    layers: tuple[LayerKey, ...]
    fingerprint: str | None
    source: str

    def require(self, fingerprint: str, layers: Sequence[LayerKey]) -> "TrainedController":
        """Return this controller if it fits a model.

        Args:
            fingerprint: Identity of the model.
            layers: Its layers.

        Raises:
            ValueError: It belongs to another model.
        """
        if self.fingerprint not in (None, fingerprint):
            raise ValueError(
                f"controller {self.source} belongs to another model: it was trained for {self.fingerprint}, the model "
                f"here is {fingerprint}"
            )
        strangers = [str(layer) for layer in self.layers if layer not in layers]
        if strangers:
            raise ValueError(f"controller {self.source} belongs to another model: this one has no {strangers[0]}")
        return self


def routing_guard(
    controller: TrainedController,
    ready: Sequence[LayerKey],
    *,
    quality_speed: float = 0.5,
    mode: PolicyMode = "threshold",
    temperature: float = 1.0,
    seed: int = 0,
) -> PolicyGuard:
    """Make the guard that lets a controller decide.

    Args:
        controller: Who decides.
        ready: Layers whose students may run.
        quality_speed: 0 = mostly exact, 1 = mostly students.
        mode: Whether it draws or decides.
        temperature: Of the draws.
        seed: Of the draws.
    """
    eligible = torch.tensor([layer in set(ready) for layer in controller.layers])
    return PolicyGuard(
        controller.policy,
        controller.layers,
        mode="sample" if mode == "stochastic" else "threshold",
        eligible=eligible,
        threshold=threshold_from_quality_speed(quality_speed),
        temperature=temperature,
        seed=seed,
    )


def load_controller(found: CheckpointPlace) -> TrainedController:
    """Read a controller.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: It is damaged, or something else.
    """
    if found.old is not None:
        old = read_legacy_controller(found.old)
        layers = tuple(LayerKey("single", index) for index in range(old.policy.layers))
        return TrainedController(old.policy, layers, old.fingerprint, str(found.old))
    if not (found.folder / "LATEST").exists():
        raise FileNotFoundError(
            f"there is no controller at {found.folder}; train one with Flux2TTRControllerTrainer, or correct the path"
        )
    saved = _read(found)
    manifest = cast(TrainerManifest, saved.manifest)
    layers = tuple(LayerKey.parse(name) for name in manifest["layers"])
    policy = RoutingPolicy(len(layers), PolicyConfig(**cast(dict[str, Any], manifest["policy"])))
    # Weights may have been loaded in inference mode; a policy that only answers does not mind.
    best = with_prefix(saved.tensors, "best.")
    policy.load_state_dict(best or with_prefix(saved.tensors, "policy."))
    fingerprint = saved.manifest.get("fingerprint")
    return TrainedController(policy, layers, None if fingerprint is None else str(fingerprint), str(found.folder))


def load_training(found: CheckpointPlace, fingerprint: str) -> TrainerState | None:
    """Read the state of a training; ``None`` if there is none yet.

    Raises:
        CheckpointError: It is damaged, of another model, or something else.
    """
    if not (found.folder / "LATEST").exists():
        return None
    saved = _read(found, fingerprint)
    return {"tensors": saved.tensors, "manifest": cast(TrainerManifest, saved.manifest)}


def save_training(found: CheckpointPlace, state: TrainerState, fingerprint: str) -> None:
    """Save the state of a training.

    Raises:
        OSError: The disk refuses.
    """
    save_checkpoint(found.folder, state["tensors"], {"kind": KIND, **state["manifest"]}, fingerprint=fingerprint)


def _read(found: CheckpointPlace, fingerprint: str | None = None) -> Checkpoint:
    saved = load_checkpoint(found.folder, fingerprint=fingerprint)
    if saved.manifest.get("kind") != KIND:
        raise CheckpointError(f"checkpoint {found.folder} holds {saved.manifest.get('kind')!r}, not a {KIND}")
    return saved
