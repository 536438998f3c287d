"""Checkpoints that survive being killed at any byte, and notice every changed one.

A checkpoint is a folder. Each save writes a new folder inside it and then moves one small pointer file:

    students/
        LATEST                 name of the newest save and the sha256 of its manifest
        save-000002/
            model.safetensors  tensors whose name has no "/" or begins with "model/"
            optim.safetensors  tensors whose name begins with "optim/", and so on for other prefixes
            manifest.json      schema, fingerprint of the model, sha256 and size of each file, the caller's facts

Until the pointer has moved, the old save is the checkpoint; afterwards it is removed.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SCHEMA = 1
_POINTER = "LATEST"
_MANIFEST = "manifest.json"
_DEFAULT_GROUP = "model"
_ABANDONED_SECONDS = 3600.0


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that says which and why."""


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
        tensors: By name, on the CPU.
        manifest: The facts given at saving, and ``fingerprint`` if there was one.
    """

    tensors: dict[str, Tensor]
    manifest: dict[str, object]


def save_checkpoint(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, object],
    *,
    fingerprint: str | None = None,
) -> Path:
    """Save tensors and facts; whenever this is killed, the save before it still loads.

    Args:
        path: The checkpoint's folder; made if missing.
        tensors: By name. ``"group/name"`` goes to the file ``group.safetensors``, a name without ``/`` to ``model``.
        manifest: JSON values. A ``"fingerprint"`` among them counts as the argument.
        fingerprint: Identity of the model that the tensors belong to, e.g. a sha256 of its weights.

    Returns:
        The folder of this save.

    Raises:
        ValueError: A fact is no JSON value, or a tensor name has no usable group.
        OSError: The disk refuses.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(manifest)
    if fingerprint is not None:
        facts["fingerprint"] = fingerprint
    scratch = folder / f"tmp-{os.getpid()}-{time.time_ns()}"
    scratch.mkdir()
    try:
        files = {}
        for group, members in _grouped(tensors).items():
            file = scratch / f"{group}.safetensors"
            try:
                save_file(members, file)
            except SafetensorError as error:
                raise OSError(errno.EIO, f"cannot be written: {error}", str(file)) from error
            _sync(file)
            files[file.name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        text = _manifest_text({"schema": SCHEMA, "files": files, "facts": facts})
        _write(scratch / _MANIFEST, text)
        _sync(scratch)
        target = _published(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _sync(folder)
    pointer = folder / f"tmp-{os.getpid()}-{time.time_ns()}.pointer"
    _write(pointer, f"{target.name} {hashlib.sha256(text.encode()).hexdigest()}\n")
    os.replace(pointer, folder / _POINTER)
    _sync(folder)
    _remove_old(folder, target)
    return target


def load_checkpoint(
    path: Path | str, *, fingerprint: str | None = None, groups: Collection[str] | None = None
) -> Checkpoint:
    """Load the newest save, after checking every byte of what is loaded.

    Args:
        path: The checkpoint's folder.
        fingerprint: The model at hand; ``None`` skips the comparison.
        groups: Only the tensors of these files, e.g. ``("model",)``; ``None`` = all.

    Raises:
        CheckpointError: There is none, it is damaged, of an unknown schema, or of another model.
    """
    folder = Path(path)
    pointed = _pointer(folder)
    try:
        return _load_save(folder, pointed, fingerprint, groups)
    except CheckpointError:
        # A save by another process may have removed the folder after its pointer was read.
        again = _pointer(folder)
        if again == pointed:
            raise
        return _load_save(folder, again, fingerprint, groups)


def check_keys(path: Path | str, found: Collection[str], expected: Collection[str]) -> None:
    """Check that a checkpoint has exactly the names that its reader knows.

    Raises:
        CheckpointError: Names are missing or unknown.
    """
    for kind, names in (("lacks", set(expected) - set(found)), ("has unknown", set(found) - set(expected))):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"checkpoint {path} {kind} entries: {shown}")


def _load_save(
    folder: Path, pointed: tuple[str, str], fingerprint: str | None, groups: Collection[str] | None
) -> Checkpoint:
    save = folder / pointed[0]
    manifest = _read_manifest(save, pointed[1])
    facts = manifest["facts"]
    files = manifest["files"]
    if not isinstance(facts, dict) or not isinstance(files, dict):
        raise CheckpointError(f"checkpoint {save} has a malformed {_MANIFEST}")
    if fingerprint is not None and facts.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another model: it was saved for {facts.get('fingerprint')}, "
            f"the model here is {fingerprint}"
        )
    tensors: dict[str, Tensor] = {}
    for name, entry in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"checkpoint {save} is malformed: it names {name!r}, which lies outside of it")
        group = name.removesuffix(".safetensors")
        if groups is None or group in groups:
            prefix = "" if group == _DEFAULT_GROUP else f"{group}/"
            tensors |= {f"{prefix}{key}": tensor for key, tensor in _read_tensors(save / name, entry).items()}
    return Checkpoint(tensors, facts)


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        group, separator, rest = name.partition("/")
        if not separator or "." in group or ":" in group:
            # Layer names may hold a slash of their own; a group is a plain word before the first one.
            group, rest = _DEFAULT_GROUP, name
        elif group == _DEFAULT_GROUP:
            raise ValueError(f"write {rest!r} instead of {name!r}: tensors without a group are the model")
        # A copy: safetensors refuses views and tensors that share memory.
        groups[group][rest] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return groups


def _read_manifest(save: Path, digest: str) -> dict[str, object]:
    try:
        text = (save / _MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {save} has no readable {_MANIFEST}: {error.strerror}") from error
    if hashlib.sha256(text).hexdigest() != digest:
        raise CheckpointError(f"checkpoint {save} is damaged: {_MANIFEST} does not match its sha256")
    manifest: dict[str, object] = json.loads(text)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"checkpoint {save} has schema {manifest.get('schema')}, this version reads {SCHEMA}")
    return manifest


def _read_tensors(file: Path, entry: Mapping[str, object]) -> dict[str, Tensor]:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"checkpoint file {file} is damaged: {size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"checkpoint file {file} is damaged: it does not match its sha256")
        tensors: dict[str, Tensor] = load_file(file)
    except OSError as error:
        raise CheckpointError(f"checkpoint file {file} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {file} is damaged: {error}") from error
    return tensors


def _pointer(folder: Path) -> tuple[str, str]:
    """Return the name of the newest save and the sha256 of its manifest."""
    try:
        text = (folder / _POINTER).read_bytes().decode("ascii")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no checkpoint at {folder}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {_POINTER} cannot be read: {error}") from error
    name, _, digest = text.removesuffix("\n").partition(" ")
    well_formed = text == f"{name} {digest}\n" and len(digest) == hashlib.sha256().digest_size * 2
    if not well_formed or not name.startswith("save-") or not name.removeprefix("save-").isdecimal():
        raise CheckpointError(f"checkpoint {folder} is damaged: {_POINTER} is malformed")
    return name, digest


def _published(scratch: Path, folder: Path) -> Path:
    """Give a finished save the next free number."""
    taken = [int(save.name.removeprefix("save-")) for save in folder.glob("save-*") if save.name[5:].isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        target = folder / f"save-{number:06d}"
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():
                raise
            number += 1
        else:
            return target


def _remove_old(folder: Path, current: Path) -> None:
    """Remove earlier saves, and scratch left behind by processes that were killed."""
    for entry in folder.iterdir():
        is_save = entry.name.startswith("save-") and entry.name < current.name
        try:
            abandoned = entry.name.startswith("tmp-") and time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
            if abandoned and entry.is_file():
                entry.unlink()
        except FileNotFoundError:
            continue
        if (is_save or abandoned) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def _manifest_text(manifest: Mapping[str, object]) -> str:
    try:
        return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the manifest must hold finite JSON values only: {error}") from error


def _write(file: Path, text: str) -> None:
    with file.open("wb") as handle:
        handle.write(text.encode())
        handle.flush()
        os.fsync(handle.fileno())


def _sync(path: Path) -> None:
    """Make a file or the entries of a folder durable; Windows cannot open folders and needs no such call."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
