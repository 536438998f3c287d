"""Files of a training run: checkpoint, log and the finished teacher; every one is replaced as a whole or not at all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ttr_distill.tiny.codec import PatchCodec
from ttr_distill.tiny.teacher import CONFIG_FILE, TEXT_FILE, TRANSFORMER_FILE, VOCABULARY_FILE

STATE_FILE = "state.pt"
LOG_FILE = "loss.jsonl"
_CURVE_POINTS = 120


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        steps: Steps of each stage.
        done: Updates made.
        cpu_seconds: Spent in training, including earlier parts of a resumed run.
        samples: Examples seen, by side.
    """

    steps: tuple[int, ...]
    done: int = 0
    cpu_seconds: float = 0.0
    samples: dict[str, int] = field(default_factory=dict)


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to disk, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class RunStore:
    """Checkpoint and log of one run.

    Args:
        folder: Where they lie.
        identity: Describes the run's options; a checkpoint with another one is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity
        folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Read the checkpoint and cut the log back to it; ``None`` if there is none.

        Raises:
            ValueError: The checkpoint belongs to a run with other options.
        """
        path = self.folder / STATE_FILE
        log = self.folder / LOG_FILE
        if not path.is_file():
            log.unlink(missing_ok=True)
            return None
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if stored["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds a run with other options; give another folder, or delete {path.name}"
            )
        rows = [row for row in self.rows() if row["step"] < stored["progress"]["done"]]
        replace_file(log, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return stored

    def save(self, trainer: Mapping[str, object], progress: Progress) -> None:
        """Write the checkpoint."""
        content = io.BytesIO()
        torch.save({"identity": self.identity, "progress": asdict(progress), "trainer": dict(trainer)}, content)
        replace_file(self.folder / STATE_FILE, content.getvalue())

    def log(self, row: Mapping[str, float]) -> None:
        """Append a line to the log."""
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """Read the log; a last line that was cut off is left out."""
        path = self.folder / LOG_FILE
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def curve(self) -> dict[str, object]:
        """Summarise the log: mean losses of about 120 equal stretches, and every validation loss."""
        rows = self.rows()
        width = max(1, -(-len(rows) // _CURVE_POINTS))
        stretches = [rows[start : start + width] for start in range(0, len(rows), width)]
        training = [
            {
                "step": stretch[-1]["step"],
                "cpu_seconds": stretch[-1]["cpu_seconds"],
                "loss": round(sum(row["loss"] for row in stretch) / len(stretch), 5),
            }
            for stretch in stretches
        ]
        validation = [{"step": row["step"], "loss": row["validation_loss"]} for row in rows if "validation_loss" in row]
        return {"training_loss": training, "validation_loss": validation}


def write_teacher(
    out: Path,
    *,
    config: Mapping[str, object],
    weights: Mapping[str, Tensor],
    codec: PatchCodec,
    vocabulary: str,
    extra: Mapping[str, bytes],
) -> None:
    """Write a teacher as ``load_teacher`` reads it; the transformer in float16.

    Args:
        out: Folder.
        config: Of the transformer.
        weights: Named ``transformer.*`` and ``text.*``.
        codec: The image codec.
        vocabulary: JSON text.
        extra: More files by name.
    """
    transformer = {
        name.removeprefix("transformer."): weight.detach().half().contiguous()
        for name, weight in weights.items()
        if name.startswith("transformer.")
    }
    rest = {name: weight.detach().contiguous() for name, weight in weights.items() if name.startswith("text.")}
    rest |= {f"codec.{name}": value.contiguous() for name, value in codec.state_dict().items()}
    replace_file(out / CONFIG_FILE, (json.dumps(dict(config), indent=2) + "\n").encode())
    replace_file(out / TRANSFORMER_FILE, save(transformer))
    replace_file(out / TEXT_FILE, save(rest))
    replace_file(out / VOCABULARY_FILE, vocabulary.encode())
    for name, content in extra.items():
        replace_file(out / name, content)
