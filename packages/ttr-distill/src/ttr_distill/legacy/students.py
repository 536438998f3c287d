"""Reads students from ``flux2_ttr_v2`` files.

The first generation of these files has feature networks of two layers and adds the landmark branch; its students are
``hkr`` students with other settings (see ``HkrConfig``). They are read, not written.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from attn_dispatch import LayerKey
from torch import Tensor

from ttr_distill.checkpoint import CheckpointError, check_keys
from ttr_distill.grad import training_mode
from ttr_distill.legacy.payload import (
    MODEL_KEY,
    check_model,
    moments_by_name,
    number,
    read_payload,
    section,
    tensors_of,
)
from ttr_distill.legacy.writing import FORMAT, RELATIVE_L2, parameters_by_name
from ttr_distill.student.attention import logit
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.hkr import HkrConfig
from ttr_distill.student.presets import StudentConfig, preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.layer import LayerTraining
from ttr_distill.training.loss import LOG_VAR_RANGE
from ttr_distill.training.state import SavedState

logger = logging.getLogger(__name__)

_LOG_VARS = MappingProxyType({"log_var_huber": 0.0, "log_var_cosine": -1.0})
_USED = frozenset({"format", "layers", "optimizer_states", "layer_specs", "loss_weight_optimizer_state"})


class LegacyStudents(NamedTuple):
    """What a file held.

    Attributes:
        bank: The students; layers that the file names without weights are fresh.
        readiness: Who is ready, judged by the thresholds given at reading.
        training: For ``Distiller.load_state_dict``.
        settings: The file's other settings by name, for whom they concern; none of them is applied.
        fingerprint: Which model the file says it belongs to; ``None`` if it does not say.
    """

    bank: StudentBank
    readiness: ReadinessTracker
    training: SavedState
    settings: Mapping[str, object]
    fingerprint: str | None


def read_legacy_students(
    path: Path | str, *, fingerprint: str | None = None, readiness: ReadinessConfig | None = None
) -> LegacyStudents:
    """Read a ``flux2_ttr_v2`` file; safe inside ``torch.inference_mode()``, and runs no code of the file.

    Args:
        path: The file.
        fingerprint: Identity of the model at hand. Most files do not say which model they belong to; one that does is
            compared.
        readiness: Thresholds by which the file's distances are judged. Those were measured on the queries that were
            trained on; where the file has no relative L2 distance it is taken from the cosine distance, as if the
            answers had the right length.

    Raises:
        CheckpointError: No such file, damaged, of another format or model, or it could run code.
    """
    payload = read_payload(path, FORMAT)
    if not check_model(path, payload, fingerprint) and fingerprint is not None:
        logger.warning("%s does not say which model it belongs to; it is taken for one of this model", path)
    with training_mode():
        try:
            weights = {name: tensors_of(state, name) for name, state in section(payload, "layers").items()}
            specs = section(payload, "layer_specs")
            config = _config(payload, weights)
            bank = _bank(path, config, weights, specs, raw_alpha=payload.get("alpha_format") != "logit")
            tracker = ReadinessTracker(readiness)
            tracker.load_state_dict(_readiness(payload, bank))
            training = _training(payload, bank, tracker, weights)
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from error
    found = payload.get(MODEL_KEY)
    settings = MappingProxyType({name: value for name, value in payload.items() if name not in _USED})
    return LegacyStudents(bank, tracker, training, settings, None if found is None else str(found))


def _config(payload: Mapping[str, object], weights: Mapping[str, Mapping[str, Tensor]]) -> StudentConfig:
    """Settings of the students; the first generation is known by its shallower networks."""
    feature_dim = payload.get("feature_dim")
    if not isinstance(feature_dim, int):
        raise ValueError(f"invalid checkpoint feature_dim {feature_dim!r}")
    first_generation = bool(weights) and all("kernel.phi_net_q.4.weight" not in state for state in weights.values())
    if first_generation or (not weights and "landmark_count" in payload):
        count = max(1, int(number(payload.get("landmark_count"), 128)))
        return preset(
            "hkr",
            feature_dim=feature_dim,
            map_layers=2,
            split_qk=any(not _shared(state) for state in weights.values()),
            blend="additive",
            conditioned=False,
            alpha_init=number(payload.get("alpha_init"), 0.1),
            landmark_minimum=count,
            landmark_maximum=count,
        )
    defaults = HkrConfig()
    return preset(
        "hkr",
        feature_dim=feature_dim,
        landmark_fraction=min(1.0, max(0.0, number(payload.get("landmark_fraction"), defaults.landmark_fraction))),
        landmark_minimum=max(1, int(number(payload.get("landmark_min"), defaults.landmark_minimum))),
        landmark_maximum=max(0, int(number(payload.get("landmark_max"), defaults.landmark_maximum))),
        alpha_init=min(1.0, max(0.0, number(payload.get("alpha_init"), defaults.alpha_init))),
        alpha_max=min(1.0, max(0.0, number(payload.get("alpha_max"), defaults.alpha_max))),
        gamma=number(payload.get("gamma"), defaults.gamma),
    )


def _shared(state: Mapping[str, Tensor]) -> bool:
    """Whether one network serves queries and keys."""
    pairs = [(name, name.replace("phi_net_q", "phi_net_k")) for name in state if "phi_net_q" in name]
    return all(other in state and torch.equal(state[name], state[other]) for name, other in pairs)


def _bank(
    path: Path | str,
    config: StudentConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    specs: Mapping[str, object],
    *,
    raw_alpha: bool,
) -> StudentBank:
    shapes = set()
    for name in {*specs, *weights}:
        spec = specs.get(name)
        if not isinstance(spec, dict):
            raise ValueError(f"layer {name} has weights and no layer_specs")
        shapes.add((int(spec["num_heads"]), int(spec["head_dim"])))
    if len(shapes) != 1:
        raise ValueError(f"layer_specs must name at least one layer, all of one shape, got {sorted(shapes)}")
    heads, width = shapes.pop()
    bank = StudentBank.for_layers(config, [LayerKey.parse(name) for name in {*specs, *weights}], heads, width)
    convex = isinstance(config.settings, HkrConfig) and config.settings.blend == "convex"
    for name, state in weights.items():
        student = bank[LayerKey.parse(name)]
        expected = student.state_dict()
        check_keys(path, state, expected)
        wrong = [entry for entry, tensor in state.items() if tensor.shape != expected[entry].shape]
        if wrong:
            have, need = tuple(state[wrong[0]].shape), tuple(expected[wrong[0]].shape)
            raise ValueError(f"{wrong[0]} of layer {name} has shape {have}, its settings need {need}")
        loaded = {entry: tensor.float() for entry, tensor in state.items()}
        if raw_alpha and convex:
            loaded["alpha"] = migrated_alpha(loaded["alpha"])
        student.load_state_dict(loaded)
    return bank


def migrated_alpha(alpha: Tensor) -> Tensor:
    """Turn a blend that was saved as a share between 0 and 1, ``[]``, into a logit; any other value is one already."""
    value = float(alpha)
    return torch.full_like(alpha, logit(value)) if 0.0 < value < 1.0 else alpha


def _readiness(payload: Mapping[str, object], bank: StudentBank) -> dict[str, object]:
    counts, cosines = section(payload, "layer_update_count"), section(payload, "layer_ema_cosine_dist")
    lengths, flags = section(payload, RELATIVE_L2), section(payload, "layer_ready")
    state: dict[str, object] = {}
    for layer in map(str, bank.layers):
        cosine = number(cosines.get(layer), math.nan)
        known = math.isfinite(cosine)
        if not known and not counts.get(layer):
            continue
        state[layer] = {
            "updates": int(number(counts.get(layer), 0)),
            "ema_cosine": cosine if known else None,
            "ema_relative_l2": number(lengths.get(layer), math.sqrt(2.0 * max(0.0, cosine))) if known else None,
            "level": "ready" if flags.get(layer) is True else "unready",
            "pending": [],
        }
    return state


def _training(
    payload: Mapping[str, object],
    bank: StudentBank,
    tracker: ReadinessTracker,
    weights: Mapping[str, Mapping[str, Tensor]],
) -> SavedState:
    """The optimiser states and loss weights in the form that a distiller of this package takes."""
    distiller = Distiller(bank, tracker)
    counts, states = section(payload, "layer_update_count"), section(payload, "optimizer_states")
    log_vars = {name: number(payload.get(f"loss_{name}"), default) for name, default in _LOG_VARS.items()}
    shared = payload.get("loss_weight_optimizer_state")
    for name, state in weights.items():
        layer = distiller.layer_training(LayerKey.parse(name))
        layer.updates = int(number(counts.get(name), 0))
        with torch.no_grad():
            for entry, value in log_vars.items():
                getattr(layer.loss, entry).fill_(min(max(value, LOG_VAR_RANGE[0]), LOG_VAR_RANGE[1]))
        moments: dict[str, dict[str, Tensor]] = {}
        if name in states:
            moments |= moments_by_name(states[name], [*(entry for entry in state if entry != "alpha"), "alpha"])
        if shared is not None:
            moments |= moments_by_name(shared, list(_LOG_VARS))
        _set_moments(layer, moments)
    return distiller.state_dict(include_replay=False)


def _set_moments(layer: LayerTraining, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    parameters = parameters_by_name(layer)
    for name, entry in moments.items():
        parameter = parameters[name]
        if entry["exp_avg"].numel() != parameter.numel():
            have, need = tuple(entry["exp_avg"].shape), tuple(parameter.shape)
            raise ValueError(f"the optimiser state of {name} is {have}, the parameter {need}")
        shaped = {key: value if key == "step" else value.reshape(parameter.shape) for key, value in entry.items()}
        layer.optimizer.state[parameter] = {key: value.clone() for key, value in shaped.items()}
