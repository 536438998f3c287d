"""Reads single-file checkpoints of the ``flux2_ttr`` family without running any code that they may hold."""

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ttr_distill.checkpoint import CheckpointError
from ttr_distill.files import replaced_atomically

MODEL_KEY = "model_fingerprint"
"""Where a file says which model it belongs to; files written by other programs have no such key."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError)


def read_payload(path: Path | str, *forms: str) -> dict[str, object]:
    """Read a file that ``torch.save`` wrote; only tensors and plain values are accepted.

    Args:
        path: The file.
        *forms: Values that its ``format`` may have.

    Returns:
        The saved mapping, tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, of another format, or holds anything that would run code.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint file {file}")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"checkpoint file {file} is damaged: {damaged} does not match its checksum")
        payload = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint file {file} holds more than tensors and plain values, loading it could run code; refused"
        ) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint file {file} cannot be read: {error.strerror or 'not a file'}") from error
    except (zipfile.BadZipFile, *_UNREADABLE) as error:
        raise CheckpointError(f"checkpoint file {file} is damaged or no checkpoint") from error
    if not isinstance(payload, dict) or payload.get("format") not in forms:
        found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        wanted = " or ".join(repr(form) for form in forms)
        raise CheckpointError(f"unsupported checkpoint format in {file}: {found!r} instead of {wanted}")
    return payload


def write_payload(path: Path | str, payload: Mapping[str, object]) -> Path:
    """Write a file that ``read_payload`` reads; the old file survives whatever happens meanwhile.

    Returns:
        The file.
    """
    file = Path(path)
    with replaced_atomically(file) as beside:
        torch.save(dict(payload), beside)
    return file


def check_model(path: Path | str, payload: Mapping[str, object], fingerprint: str | None) -> bool:
    """Check that a file belongs to the model at hand.

    Returns:
        Whether the file says which model it belongs to.

    Raises:
        CheckpointError: It belongs to another one.
    """
    found = payload.get(MODEL_KEY)
    if found is None:
        return False
    if fingerprint is not None and found != fingerprint:
        raise CheckpointError(
            f"checkpoint {path} belongs to another model: it was saved for {found}, the model here is {fingerprint}"
        )
    return True


def number(value: object, default: float) -> float:
    """Read a finite number, else the default."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and isinstance(value, int | float) else default


def section(payload: Mapping[str, object], name: str) -> dict[str, object]:
    """Read a mapping with text keys; an absent one is empty.

    Raises:
        ValueError: It is something else.
    """
    value = payload.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is no mapping by name")
    return value


def tensors_of(value: object, what: str) -> dict[str, Tensor]:
    """Read a state dict.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{what} is no state dict")
    return {str(name): tensor for name, tensor in value.items()}


def moments_by_name(state: object, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Walk through the state dict of an Adam optimiser.

    Args:
        state: As ``torch.optim.AdamW.state_dict()`` gave it.
        names: Names of the parameters in the order in which the optimiser got them.

    Yields:
        Name of a parameter and its ``MOMENTS``, in float32.

    Raises:
        ValueError: The state has another form, or does not have that many parameters.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    entries = state.get("state") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not isinstance(entries, dict):
        raise ValueError("the optimiser state has no groups or no entries")
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(names):
        raise ValueError(f"the optimiser state is of {len(numbers)} parameters, the model has {len(names)}")
    for name, position in zip(names, numbers, strict=True):
        entry = entries.get(position)
        if entry is not None:
            yield name, {key: torch.as_tensor(entry[key]).float() for key in MOMENTS}
