"""Students on disk: weights, settings, readiness and, if wanted, the state of their training."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from attn_dispatch import LayerKey

from ttr_distill.checkpoint import Checkpoint, CheckpointError, check_keys, load_checkpoint, save_checkpoint
from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.feature_map_catalog import FeatureMaps
from ttr_distill.student.presets import StudentConfig, build_student
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.state import SavedState

KIND = "students"
SAME_ANSWERS = frozenset({"alpha_init", "feature_dtype", "map_dtype", "training_dtype", "workspace_bytes"})
"""Settings of how an answer is computed or how a new student begins: held-out distances stay true when they change."""
_FACTS = ("kind", "fingerprint", "student", "heads", "width", "layers", "readiness", "training")


class SavedStudents(NamedTuple):
    """What ``load_students`` found.

    Attributes:
        bank: The students.
        readiness: Who is ready, judged by the thresholds given at loading.
        training: For ``Distiller.load_state_dict``; ``None`` if it was not saved or not asked for.
        changed: One sentence per setting in which the caller differs from the checkpoint.
    """

    bank: StudentBank
    readiness: ReadinessTracker
    training: SavedState | None
    changed: tuple[str, ...] = ()


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
    config: StudentConfig | None = None,
    readiness: ReadinessConfig | None = None,
    device: torch.device | str = "cpu",
    training: bool = False,
    feature_maps: FeatureMaps | None = None,
) -> SavedStudents:
    """Load students; safe inside ``torch.inference_mode()``.

    The caller's settings win over the saved ones, the checkpoint supplies what was learned. A changed setting that the
    learned weights cannot follow is an error. One that changes the answers makes the saved distances untrue: every
    layer is unready until it is measured again.

    Args:
        path: The checkpoint's folder.
        fingerprint: Identity of the teacher at hand; ``None`` skips the comparison, e.g. to look at a file.
        config: Settings of the students; ``None`` takes those of the checkpoint.
        readiness: Thresholds by which the saved distances are judged.
        device: Where the students go.
        training: Load the state of their training as well, which serving does not need.
        feature_maps: Custom feature maps that the settings name; the built-in ones if ``None``.

    Raises:
        CheckpointError: No checkpoint, a damaged one, one of another model, entries that are missing or unknown, or a
            setting that cannot apply to the saved weights.
    """
    with training_mode():
        saved = load_checkpoint(path, fingerprint=fingerprint, groups=None if training else ("model",))
        facts = saved.manifest
        if facts.get("kind") != KIND:
            raise CheckpointError(f"checkpoint {path} holds {facts.get('kind')!r}, not {KIND}")
        check_keys(path, facts, _FACTS)
        try:
            bank, changed = _bank(path, saved, config, feature_maps)
            tracker = ReadinessTracker(readiness)
            if SAME_ANSWERS.issuperset(changed):
                tracker.load_state_dict(_object(facts["readiness"]))
            found = None if facts["training"] is None else _object(facts["training"])
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        bank.to(device)
    if not training or found is None:
        return SavedStudents(bank, tracker, None, tuple(changed.values()))
    state = dict(found)
    groups: tuple[str, ...] = ("optim/", "replay/")
    if not SAME_ANSWERS.issuperset(changed):
        # Samples hold what the student chose for their call (``StudentAttention.select``), under the old settings.
        state["replay"], groups = None, ("optim/",)
    rest = {name: tensor for name, tensor in saved.tensors.items() if name.startswith(groups)}
    return SavedStudents(bank, tracker, SavedState(rest, state), tuple(changed.values()))


def changed_settings(
    path: Path | str, saved: StudentConfig, wanted: StudentConfig, build: Callable[[StudentConfig], StudentAttention]
) -> dict[str, str]:
    """Compare the settings of saved students with those of the caller.

    Args:
        path: The checkpoint, for messages.
        saved: Its settings.
        wanted: Those of the caller.
        build: Makes a student of some settings.

    Returns:
        A sentence per changed setting, by its name.

    Raises:
        CheckpointError: The saved weights do not fit the caller's settings; the message names the settings.
    """
    if saved.preset != wanted.preset:
        raise CheckpointError(
            f"checkpoint {path} holds {saved.preset!r} students and the setting asks for {wanted.preset!r}; "
            "choose another checkpoint path, or the preset of this one"
        )
    before, after = saved.to_dict(), wanted.to_dict()
    names = [name for name in after if before.get(name) != after[name]]
    changed = {name: f"{name} is {after[name]}, the checkpoint was saved with {before.get(name)}" for name in names}
    shapes = _shapes(build(saved)) if names else ()
    if names and _shapes(build(wanted)) != shapes:
        guilty = [name for name in names if _shapes(build(_with(saved, name, wanted))) != shapes] or names
        sentences = "; ".join(changed[name] for name in guilty)
        raise CheckpointError(
            f"checkpoint {path} cannot follow a changed setting, its weights have other shapes: {sentences}; "
            "set it back, or start a new checkpoint"
        )
    return changed


def _shapes(student: StudentAttention) -> tuple[object, ...]:
    """What weights must fit: the entries of the state, and which of them are parameters of their own."""
    state = tuple((name, tensor.shape) for name, tensor in student.state_dict().items())
    return (*state, *(name for name, _ in student.named_parameters()))


def _with(saved: StudentConfig, name: str, wanted: StudentConfig) -> StudentConfig:
    """The saved settings with one of the wanted."""
    try:
        return StudentConfig.from_dict(saved.to_dict() | {name: wanted.to_dict()[name]})
    except ValueError:
        return wanted  # the setting cannot change alone


def _bank(
    path: Path | str, saved: Checkpoint, wanted: StudentConfig | None, feature_maps: FeatureMaps | None
) -> tuple[StudentBank, dict[str, str]]:
    facts = saved.manifest
    config = StudentConfig.from_dict(_object(facts["student"]))
    heads, width, layers = facts["heads"], facts["width"], facts["layers"]
    if not isinstance(heads, int) or not isinstance(width, int) or not isinstance(layers, list):
        raise ValueError(f"heads, width and layers must be numbers and a list, got {heads!r}, {width!r}, {layers!r}")
    build = partial(build_student, heads=heads, width=width, feature_maps=feature_maps)
    changed = {} if wanted is None else changed_settings(path, config, wanted, build)
    keys = [LayerKey.parse(str(layer)) for layer in layers]
    bank = StudentBank.for_layers(wanted or config, keys, heads, width, feature_maps=feature_maps)
    expected = bank.state_dict()
    weights = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(("optim/", "replay/"))}
    check_keys(path, weights, expected)
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            have, need = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{name} has shape {have}, its settings need {need}")
    bank.load_state_dict(weights)
    return bank, changed


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r}")
    return value
