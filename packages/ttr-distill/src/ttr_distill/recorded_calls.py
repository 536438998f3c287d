"""Recorded attention calls on disk: written once while a model samples, read many times by memory-mapping.

A recording is a folder::

    captures/
        manifest.json              model, student, the shards with size and sha256, every sample's facts, own sha256
        shard-000001.safetensors   tensors named "<number of the sample in the shard>.<name>"

Shards are written whole, and the manifest, moved into place behind them, names those that count: a killed recording
goes on after the last run that the manifest holds.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from attn_dispatch import LayerKey
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ttr_distill.checkpoint import CheckpointError
from ttr_distill.files import write_atomically
from ttr_distill.training.replay import ReplaySample

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of a recording.

    Attributes:
        file: Its name.
        bytes: Its size.
        sha256: Of its content.
        samples: ``ReplaySample.facts`` of each sample in it.
    """

    file: str
    bytes: int
    sha256: str
    samples: list[dict[str, object]]


class _Manifest(NamedTuple):
    facts: dict[str, object]
    runs: int
    shards: list[Shard]


class CaptureWriter:
    """Collects samples and writes them to shards of about one size.

    Args:
        folder: The recording; made if missing. Runs that its manifest holds are kept.
        facts: JSON values that a reader must know, such as the fingerprint of the model; those of an existing
            recording must be equal.
        shard_bytes: A shard is written at the end of the run that brings it to this size.

    Attributes:
        runs: Finished runs that are on disk or will be with the next shard.

    Raises:
        CheckpointError: The folder holds a damaged recording, or one with other facts.
    """

    def __init__(self, folder: Path | str, facts: Mapping[str, object], *, shard_bytes: int = 256 * 2**20) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
        self.folder = Path(folder)
        self._facts = dict(facts)
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._pending: list[ReplaySample] = []
        self._run: list[ReplaySample] = []
        self.runs = 0
        if (self.folder / MANIFEST).exists():
            manifest = _read_manifest(self.folder)
            for name, value in self._facts.items():
                found = manifest.facts.get(name)
                if found != value:
                    raise CheckpointError(
                        f"recording {self.folder} has {name} {found}, not {value}; choose another folder"
                    )
            self._shards, self.runs = manifest.shards, manifest.runs

    def take(self, sample: ReplaySample) -> None:
        """Keep a sample of the current run."""
        self._run.append(sample)

    def drop_run(self) -> None:
        """Forget the samples of a run that did not finish."""
        self._run.clear()

    def end_run(self) -> None:
        """The run is complete; writes a shard if enough has come together.

        Raises:
            OSError: The disk refuses.
        """
        self._pending += self._run
        self._run = []
        self.runs += 1
        if sum(sample.nbytes for sample in self._pending) >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what finished runs have left in memory.

        Raises:
            OSError: The disk refuses.
        """
        if self._pending:
            tensors = {
                f"{number}.{name}": tensor.detach().to("cpu", memory_format=torch.contiguous_format).clone()
                for number, sample in enumerate(self._pending)
                for name, tensor in sample.tensors().items()
            }
            content = save(tensors)
            name = f"shard-{len(self._shards) + 1:06d}.safetensors"
            write_atomically(self.folder / name, content)
            facts = [sample.facts() for sample in self._pending]
            self._shards.append(Shard(name, len(content), hashlib.sha256(content).hexdigest(), facts))
            self._pending = []
        _write_manifest(self.folder, _Manifest(self._facts, self.runs, self._shards))


class Captures:
    """A recording to learn from. Tensors are mapped from the files when they are asked for.

    Args:
        folder: The recording.
        fingerprint: The model at hand; ``None`` skips the comparison.

    Attributes:
        facts: What the recording says of itself.
        runs: Recorded runs.

    Raises:
        CheckpointError: There is no recording, it is damaged, or of another model.
    """

    def __init__(self, folder: Path | str, *, fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.facts = manifest.facts
        self.runs = manifest.runs
        self._shards = manifest.shards
        self._checked: set[int] = set()
        saved_for = self.facts.get("fingerprint")
        if fingerprint is not None and saved_for != fingerprint:
            raise CheckpointError(
                f"recording {folder} belongs to another model: it was made with {saved_for}, "
                f"the model here is {fingerprint}"
            )
        self._places: dict[LayerKey, list[tuple[int, int]]] = defaultdict(list)
        for shard, entry in enumerate(self._shards):
            for number, sample in enumerate(entry.samples):
                self._places[LayerKey.parse(str(sample["layer"]))].append((shard, number))

    @property
    def layers(self) -> tuple[LayerKey, ...]:
        """Layers with samples."""
        return tuple(sorted(self._places))

    def __len__(self) -> int:
        return sum(len(places) for places in self._places.values())

    def trainable(self, layer: LayerKey) -> Sequence[int]:
        """Numbers of the layer's samples that may be trained on, in the order of recording."""
        return self._numbers(layer, trainable=True)

    def heldout(self, layer: LayerKey) -> Sequence[int]:
        """Numbers of the layer's samples of held-out diffusion steps."""
        return self._numbers(layer, trainable=False)

    def load(self, layer: LayerKey, number: int) -> ReplaySample:
        """Read one sample.

        Raises:
            CheckpointError: Its shard is missing or damaged; every byte is checked when a shard is first used.
        """
        shard, place = self._places[layer][number]
        entry = self._shards[shard]
        file = self.folder / entry.file
        if shard not in self._checked:
            _check_shard(file, entry)
            self._checked.add(shard)
        tensors: dict[str, Tensor] = {}
        prefix = f"{place}."
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(prefix):
                        tensors[name.removeprefix(prefix)] = opened.get_tensor(name)
            return ReplaySample.from_parts(tensors, entry.samples[place])
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"recording shard {file} cannot be read: {error}") from error

    def _numbers(self, layer: LayerKey, *, trainable: bool) -> list[int]:
        places = self._places.get(layer, [])
        return [
            number
            for number, (shard, place) in enumerate(places)
            if bool(self._shards[shard].samples[place].get("trainable", True)) == trainable
        ]


def _check_shard(file: Path, entry: Shard) -> None:
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"recording shard {file} cannot be read: {error.strerror}") from error
    if size != entry.bytes:
        raise CheckpointError(f"recording shard {file} is damaged: {size} bytes instead of {entry.bytes}")
    if digest != entry.sha256:
        raise CheckpointError(f"recording shard {file} is damaged: it does not match its sha256")


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    body = {
        "schema": SCHEMA,
        "facts": manifest.facts,
        "runs": manifest.runs,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    content = json.dumps(body, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(content.encode()).hexdigest()
    write_atomically(folder / MANIFEST, f"{digest}\n{content}\n".encode())


def _read_manifest(folder: Path) -> _Manifest:
    try:
        text = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no recording at {folder}") from None
    except OSError as error:
        raise CheckpointError(f"recording {folder} cannot be read: {error.strerror}") from error
    digest, _, content = text.partition(b"\n")
    if hashlib.sha256(content.removesuffix(b"\n")).hexdigest().encode() != digest or not content.endswith(b"\n"):
        raise CheckpointError(f"recording {folder} is damaged: {MANIFEST} does not match its sha256")
    body = json.loads(content)
    if body["schema"] != SCHEMA:
        raise CheckpointError(f"recording {folder} has schema {body['schema']}, this version reads {SCHEMA}")
    return _Manifest(body["facts"], int(body["runs"]), [Shard(**shard) for shard in body["shards"]])
