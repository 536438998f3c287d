"""Students on disk: weights, settings, readiness and, if wanted, the state of their training."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from attn_dispatch import LayerKey

from ttr_distill.checkpoint import Checkpoint, CheckpointError, check_keys, load_checkpoint, save_checkpoint
from ttr_distill.grad import training_mode
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import StudentConfig
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.state import SavedState

KIND = "students"
_FACTS = ("kind", "fingerprint", "student", "heads", "width", "layers", "readiness", "training")


class SavedStudents(NamedTuple):
    """What ``load_students`` found.

    Attributes:
        bank: The students.
        readiness: Who is ready, judged by the thresholds given at loading.
        training: For ``Distiller.load_state_dict``; ``None`` if it was not saved or not asked for.
    """

    bank: StudentBank
    readiness: ReadinessTracker
    training: SavedState | None


def save_students(
    path: Path | str,
    bank: StudentBank,
    readiness: ReadinessTracker,
    distiller: Distiller | None = None,
    *,
    fingerprint: str,
    include_replay: bool = True,
) -> Path:
    """Save students as a checkpoint; see ``save_checkpoint``.

    Args:
        path: The checkpoint's folder.
        bank: The students.
        readiness: Who is ready.
        distiller: Their training, to go on with it later.
        fingerprint: Identity of the teacher, e.g. a sha256 of its weights.
        include_replay: Save the replay samples too (up to ``replay_bytes``), so that training goes on exactly.

    Returns:
        The folder of this save.
    """
    tensors = dict(bank.state_dict())
    training: dict[str, object] | None = None
    if distiller is not None:
        state = distiller.state_dict(include_replay=include_replay)
        tensors |= state.tensors
        training = state.facts
    manifest = {
        "kind": KIND,
        "student": bank.config.to_dict(),
        "heads": bank.heads,
        "width": bank.width,
        "layers": [str(layer) for layer in bank.layers],
        "readiness": readiness.state_dict(),
        "training": training,
    }
    return save_checkpoint(path, tensors, manifest, fingerprint=fingerprint)


def load_students(
    path: Path | str,
    *,
    fingerprint: str | None,
    readiness: ReadinessConfig | None = None,
    device: torch.device | str = "cpu",
    training: bool = False,
) -> SavedStudents:
    """Load students; safe inside ``torch.inference_mode()``.

    Args:
        path: The checkpoint's folder.
        fingerprint: Identity of the teacher at hand; ``None`` skips the comparison, e.g. to look at a file.
        readiness: Thresholds by which the saved distances are judged.
        device: Where the students go.
        training: Load the state of their training as well, which serving does not need.

    Raises:
        CheckpointError: No checkpoint, a damaged one, one of another model, or entries that are missing or unknown.
    """
    with training_mode():
        saved = load_checkpoint(path, fingerprint=fingerprint, groups=None if training else ("model",))
        facts = saved.manifest
        if facts.get("kind") != KIND:
            raise CheckpointError(f"checkpoint {path} holds {facts.get('kind')!r}, not {KIND}")
        check_keys(path, facts, _FACTS)
        try:
            bank = _bank(path, saved)
            tracker = ReadinessTracker(readiness)
            tracker.load_state_dict(_object(facts["readiness"]))
            found = None if facts["training"] is None else _object(facts["training"])
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        bank.to(device)
    if not training or found is None:
        return SavedStudents(bank, tracker, None)
    rest = {name: tensor for name, tensor in saved.tensors.items() if name.startswith(("optim/", "replay/"))}
    return SavedStudents(bank, tracker, SavedState(rest, dict(found)))


def _bank(path: Path | str, saved: Checkpoint) -> StudentBank:
    facts = saved.manifest
    config = StudentConfig.from_dict(_object(facts["student"]))
    heads, width, layers = facts["heads"], facts["width"], facts["layers"]
    if not isinstance(heads, int) or not isinstance(width, int) or not isinstance(layers, list):
        raise ValueError(f"heads, width and layers must be numbers and a list, got {heads!r}, {width!r}, {layers!r}")
    bank = StudentBank.for_layers(config, [LayerKey.parse(str(layer)) for layer in layers], heads, width)
    expected = bank.state_dict()
    weights = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(("optim/", "replay/"))}
    check_keys(path, weights, expected)
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            have, need = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{name} has shape {have}, its settings need {need}")
    bank.load_state_dict(weights)
    return bank


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r}")
    return value
