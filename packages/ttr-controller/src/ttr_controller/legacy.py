"""Routing policies in ``flux2_ttr_controller_v1`` files: read, and written where the format can say them.

The format's policies read unscaled inputs; ``PolicyConfig.legacy`` is that setting. A policy with scaled inputs has the
same weights by name and another meaning, so it is refused rather than written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from attn_dispatch.call import LayerKey
from torch import Tensor
from ttr_distill.checkpoint import CheckpointError, check_keys
from ttr_distill.grad import training_mode
from ttr_distill.legacy import (
    MODEL_KEY,
    MOMENTS,
    check_model,
    moments_by_name,
    number,
    read_payload,
    tensors_of,
    write_payload,
)

from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.trainer_state import TrainerManifest, TrainerState

FORMAT = "flux2_ttr_controller_v1"


class LegacyController(NamedTuple):
    """What a file held.

    Attributes:
        policy: The routing policy, in evaluation mode.
        moments: Optimiser moments by parameter name; empty if the file has none.
        reward_baseline: Moving mean of the reward; ``None`` if the file was saved without training state.
        reward_count: Rewards in it.
        quality_floor: Lowest reward that enters it.
        lambda_entropy: Weight of the entropy in training.
        fingerprint: Which model the file says it belongs to; ``None`` if it does not say.
    """

    policy: RoutingPolicy
    moments: Mapping[str, Mapping[str, Tensor]]
    reward_baseline: float | None = None
    reward_count: int = 0
    quality_floor: float | None = None
    lambda_entropy: float | None = None
    fingerprint: str | None = None


def read_legacy_controller(
    path: Path | str, *, layers: int | None = None, fingerprint: str | None = None
) -> LegacyController:
    """Read a ``flux2_ttr_controller_v1`` file; runs no code of the file.

    Args:
        path: The file.
        layers: Number of attention layers of the model at hand; ``None`` skips the comparison.
        fingerprint: Identity of the model at hand; compared with files that state theirs.

    Raises:
        CheckpointError: No such file, damaged, of another format, model or number of layers, or it could run code.
    """
    payload = read_payload(path, FORMAT)
    check_model(path, payload, fingerprint)
    try:
        count = _whole(payload, "num_layers")
        if layers is not None and count != layers:
            raise CheckpointError(f"controller {path} routes {count} layers, the model has {layers}")
        config = PolicyConfig.legacy(_whole(payload, "embed_dim"), _whole(payload, "hidden_dim"))
        with training_mode():
            policy = RoutingPolicy(count, config, seed=0).eval()
            weights = {name: tensor.float() for name, tensor in _weights(payload).items()}
            expected = policy.state_dict()
            check_keys(path, weights, expected)
            for name, tensor in weights.items():
                if tensor.shape != expected[name].shape:
                    have, need = tuple(tensor.shape), tuple(expected[name].shape)
                    raise ValueError(f"{name} has shape {have}, its settings need {need}")
            policy.load_state_dict(weights)
            state = payload.get("optimizer_state_dict")
            moments = {} if state is None else dict(moments_by_name(state, list(weights)))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"controller file {path} cannot be read: {error}") from error
    found = payload.get(MODEL_KEY)
    return LegacyController(
        policy,
        moments,
        _optional(payload, "reward_baseline"),
        int(number(payload.get("reward_count"), 0)),
        _optional(payload, "reward_baseline_quality_floor"),
        _optional(payload, "lambda_entropy"),
        None if found is None else str(found),
    )


def write_legacy_controller(path: Path | str, controller: LegacyController, *, learning_rate: float = 1e-3) -> Path:
    """Write a ``flux2_ttr_controller_v1`` file; the old file survives whatever happens meanwhile.

    Args:
        path: The file.
        controller: What to write; ``LegacyController(policy, {})`` for the policy alone.
        learning_rate: Step size to note in the optimiser state.

    Returns:
        The file.

    Raises:
        CheckpointError: The policy has settings that the format cannot say.
    """
    policy = controller.policy
    config = policy.config
    plain = PolicyConfig.legacy(config.embed_dim, config.hidden_dim)
    if policy.actions != 2:
        raise CheckpointError(f"{FORMAT} files know full attention and one student, not {policy.actions} attentions")
    if replace(config, pixels_per_latent=plain.pixels_per_latent) != plain:
        raise CheckpointError(
            f"{FORMAT} files cannot say {config}: their policies read unscaled inputs (PolicyConfig.legacy); "
            "train a policy with that setting to use it with other programs"
        )
    trained = controller.reward_baseline is not None
    payload: dict[str, object] = {
        "format": FORMAT,
        "num_layers": policy.layers,
        "embed_dim": config.embed_dim,
        "hidden_dim": config.hidden_dim,
        "state_dict": {name: tensor.detach().to("cpu", copy=True) for name, tensor in policy.state_dict().items()},
        "reward_baseline": controller.reward_baseline,
        "reward_count": controller.reward_count if trained else None,
        "reward_baseline_quality_floor": controller.quality_floor,
        "lambda_entropy": controller.lambda_entropy,
        "optimizer_state_dict": _optimizer_state(policy, controller.moments, learning_rate),
    }
    if controller.fingerprint is not None:
        payload[MODEL_KEY] = controller.fingerprint
    return write_payload(path, payload)


def trainer_state(controller: LegacyController) -> TrainerState:
    """Turn what a file held into the state of a training of this package, to save as a checkpoint folder.

    The format counts the layers of the stream ``single`` and says nothing of which were ready: all are eligible here,
    and the students' own readiness still decides in use.
    """
    policy = controller.policy
    tensors = {f"policy.{name}": tensor.detach().clone() for name, tensor in policy.state_dict().items()}
    for name, entry in controller.moments.items():
        tensors |= {f"optimizer.{name}.{key}": value.clone() for key, value in entry.items()}
    baseline = controller.reward_baseline
    manifest: TrainerManifest = {
        "layers": [str(LayerKey("single", index)) for index in range(policy.layers)],
        "policy": asdict(policy.config),
        "seed": 0,
        "updates": controller.reward_count,
        "eligible": [True] * policy.layers,
        "target_full": 0.5,
        "unit": 1.0,
        "prompts": [],
        "seeds": [],
        "contexts": [],
        "best_error": None,
        "best_plan": [],
        "actions": policy.actions,
        "baseline": [0.0 if baseline is None else baseline, float(controller.reward_count)],
    }
    return {"tensors": tensors, "manifest": manifest}


def _optimizer_state(
    policy: RoutingPolicy, moments: Mapping[str, Mapping[str, Tensor]], learning_rate: float
) -> dict[str, object] | None:
    if not moments:
        return None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    parameters = dict(policy.named_parameters())
    for name, entry in moments.items():
        optimizer.state[parameters[name]] = {key: entry[key].detach().to("cpu", copy=True) for key in MOMENTS}
    state: dict[str, object] = optimizer.state_dict()
    return state


def _weights(payload: Mapping[str, object]) -> dict[str, Tensor]:
    return tensors_of(payload.get("state_dict"), "state_dict")


def _whole(payload: Mapping[str, object], name: str) -> int:
    value = payload.get(name)
    if not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def _optional(payload: Mapping[str, object], name: str) -> float | None:
    value = number(payload.get(name), float("nan"))
    return None if value != value else value
