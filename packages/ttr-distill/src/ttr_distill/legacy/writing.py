"""Writes students as a ``flux2_ttr_v2`` file, for programs that read no other; see ``ttr_distill.legacy``."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

import torch
from attn_dispatch import LayerKey
from torch import Tensor, nn

from ttr_distill.checkpoint import CheckpointError
from ttr_distill.grad import training_mode
from ttr_distill.legacy.payload import MODEL_KEY, MOMENTS, section, write_payload
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.hkr import HkrConfig
from ttr_distill.student.presets import StudentConfig
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.layer import LayerTraining
from ttr_distill.training.state import SavedState

FORMAT = "flux2_ttr_v2"
RELATIVE_L2 = "layer_ema_relative_l2"
"""Where this package keeps the relative L2 distances; other readers ignore the name."""
_SAID = frozenset(
    {"feature_dim", "landmark_fraction", "landmark_minimum", "landmark_maximum", "alpha_init", "alpha_max"}
)
_FREE = frozenset({"gamma", "feature_dtype", "training_dtype", "workspace_bytes"})
_LEARNING_RATE = 1e-4
_ALPHA_RATE_FACTOR = 5.0
_THRESHOLD = 0.12
_MINIMUM_UPDATES = 24

TRAINING_SETTINGS: Mapping[str, object] = MappingProxyType(
    {
        "learning_rate": _LEARNING_RATE,
        "training_mode": False,
        "training_preview_ttr": True,
        "comet_enabled": False,
        "comet_project_name": "ttr-distillation",
        "comet_workspace": "comet-workspace",
        "comet_experiment": "",
        "comet_display_name": "",
        "comet_persist_experiment": True,
        "comet_log_every": 50,
        "last_loss": 0.0,
        "query_chunk_size": 256,
        "key_chunk_size": 1024,
        "text_tokens_guess": 77,
        "alpha_lr_multiplier": _ALPHA_RATE_FACTOR,
        "phi_lr_multiplier": 1.0,
        "training_query_token_cap": 128,
        "replay_buffer_size": 8,
        "replay_offload_cpu": True,
        "replay_storage_dtype": "float16",
        "replay_max_bytes": 768 * 2**20,
        "train_steps_per_call": 1,
        "huber_beta": 0.05,
        "grad_clip_norm": 1.0,
        "readiness_threshold": _THRESHOLD,
        "readiness_min_updates": _MINIMUM_UPDATES,
        "enable_memory_reserve": False,
        "max_safe_inference_loss": 0.5,
        "layer_start": -1,
        "layer_end": -1,
        "inference_mixed_precision": True,
        "cfg_scale": 1.0,
        "min_swap_layers": 1,
        "max_swap_layers": -1,
    }
)
"""What a file says about training where the caller says nothing: the defaults of the format's first program."""


def write_legacy_students(
    path: Path | str,
    bank: StudentBank,
    readiness: ReadinessTracker,
    training: SavedState | None = None,
    *,
    fingerprint: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write a ``flux2_ttr_v2`` file; the old file survives whatever happens meanwhile.

    Args:
        path: The file.
        bank: ``hkr`` students with settings that the format knows.
        readiness: Who is ready.
        training: From ``Distiller.state_dict``, for the optimiser states and the weights of the loss. The format has
            one pair of loss weights for all layers: the mean is written.
        fingerprint: Identity of the model; written under a name of its own, which other readers ignore.
        settings: Further entries, e.g. ``LegacyStudents.settings``; what bank, readiness and training say wins.

    Returns:
        The file.

    Raises:
        CheckpointError: The students are of another kind, or have a setting that the format cannot say.
    """
    config = _said(bank.config)
    payload: dict[str, object] = {**TRAINING_SETTINGS, **(settings or {})}
    payload.pop("landmark_count", None)
    payload |= {
        "format": FORMAT,
        "feature_dim": config.feature_dim,
        "alpha_format": "logit",
        "landmark_fraction": config.landmark_fraction,
        "landmark_min": config.landmark_minimum,
        "landmark_max": config.landmark_maximum,
        "alpha_init": config.alpha_init,
        "alpha_max": config.alpha_max,
        "gamma": config.gamma,
        "layer_specs": {str(layer): {"num_heads": bank.heads, "head_dim": bank.width} for layer in bank.layers},
        "layers": {str(layer): _copied(bank[layer].state_dict()) for layer in bank.layers},
        "layer_ema_loss": section(payload, "layer_ema_loss"),
        "layer_last_loss": section(payload, "layer_last_loss"),
    }
    payload |= _readiness(payload, bank, readiness)
    payload |= _training(payload, bank, readiness, training)
    if fingerprint is not None:
        payload[MODEL_KEY] = fingerprint
    return write_payload(path, payload)


def parameters_by_name(layer: LayerTraining) -> dict[str, nn.Parameter]:
    """Parameters of a layer's learner and of its loss."""
    return {**dict(layer.learner.named_parameters()), **dict(layer.loss.named_parameters())}


def _said(config: StudentConfig) -> HkrConfig:
    """Check that the format can say all settings."""
    settings = config.settings
    if not isinstance(settings, HkrConfig):
        raise CheckpointError(f"{FORMAT} files hold 'hkr' students only, not {config.preset!r}")
    defaults = HkrConfig()
    for field in fields(HkrConfig):
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if field.name not in _SAID | _FREE and value != default:
            raise CheckpointError(f"{FORMAT} files cannot say {field.name}={value!r}, only {default!r}")
    return settings


def _readiness(payload: Mapping[str, object], bank: StudentBank, readiness: ReadinessTracker) -> dict[str, object]:
    states = {str(layer): readiness[layer] for layer in bank.layers}
    losses = section(payload, "layer_ema_loss")
    cosines = {name: state.ema_cosine for name, state in states.items() if state.ema_cosine is not None}
    return {
        "layer_update_count": {name: state.updates for name, state in states.items()},
        "layer_ready": {name: state.level == "ready" for name, state in states.items()},
        "layer_ema_cosine_dist": cosines,
        RELATIVE_L2: {name: state.ema_relative_l2 for name, state in states.items() if name in cosines},
        "layer_readiness": {
            name: {
                "readiness_threshold": readiness.config.threshold,
                "readiness_min_updates": readiness.config.minimum_updates,
                "ema_loss": losses.get(name, math.inf),
                "ema_cosine_dist": cosines.get(name, math.nan),
                "update_count": state.updates,
                "ready": state.level == "ready",
            }
            for name, state in sorted(states.items())
        },
    }


def _training(
    payload: Mapping[str, object], bank: StudentBank, readiness: ReadinessTracker, training: SavedState | None
) -> dict[str, object]:
    if training is None:
        return {"optimizer_states": {}, "loss_weight_optimizer_state": None}
    # A copy of the students: restoring a training may change them.
    distiller = Distiller(deepcopy(bank), readiness)
    tensors = {name: value for name, value in training.tensors.items() if name.startswith("optim/")}
    distiller.load_state_dict(SavedState(tensors, {**training.facts, "replay": None}))
    names = section(training.facts, "layers")
    rate = payload["learning_rate"]
    with training_mode():
        layers = {name: distiller.layer_training(LayerKey.parse(name)) for name in names}
        entries: dict[str, object] = {
            "optimizer_states": {name: _optimizer_state(layer, float(str(rate))) for name, layer in layers.items()},
            "loss_weight_optimizer_state": _loss_optimizer_state(list(layers.values()), float(str(rate))),
        }
        for name in ("log_var_huber", "log_var_cosine"):
            values = [float(getattr(layer.loss, name).detach()) for layer in layers.values()]
            if values:
                entries[f"loss_{name}"] = sum(values) / len(values)
    return entries


def _optimizer_state(layer: LayerTraining, rate: float) -> dict[str, object]:
    """AdamW state with the format's two groups: the blend last, everything else in the order of the module."""
    parameters = dict(layer.learner.named_parameters())
    alpha = parameters.pop("alpha")
    groups = [
        {"params": list(parameters.values()), "lr": rate},
        {"params": [alpha], "lr": rate * _ALPHA_RATE_FACTOR},
    ]
    optimizer = torch.optim.AdamW(groups)
    for parameter in (*parameters.values(), alpha):
        if parameter in layer.optimizer.state:
            entry = layer.optimizer.state[parameter]
            optimizer.state[parameter] = _copied({key: torch.as_tensor(entry[key]) for key in MOMENTS})
    state: dict[str, object] = optimizer.state_dict()
    return state


def _loss_optimizer_state(layers: Sequence[LayerTraining], rate: float) -> dict[str, object] | None:
    """AdamW state of one pair of log-variances: the mean over the layers."""
    trained = [layer for layer in layers if layer.loss.log_var_huber in layer.optimizer.state]
    if not trained:
        return None
    pair = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(pair, lr=rate)
    for parameter, name in zip(pair, ("log_var_huber", "log_var_cosine"), strict=True):
        entries = [layer.optimizer.state[getattr(layer.loss, name)] for layer in trained]
        means = {
            key: torch.stack([entry[key].float().cpu().reshape(()) for entry in entries]).mean() for key in MOMENTS
        }
        optimizer.state[parameter] = {key: value if key == "step" else value[None] for key, value in means.items()}
    state: dict[str, object] = optimizer.state_dict()
    return state


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
