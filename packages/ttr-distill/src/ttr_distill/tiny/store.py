"""Files of a training run: checkpoint, log and the finished teacher; every one is replaced as a whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors.torch import save
from torch import Tensor

from ttr_distill.files import write_atomically
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


class StoredRun(TypedDict):
    """What a checkpoint holds.

    Attributes:
        identity: Describes the run's options.
        progress: How far the run is.
        trainer: State of the trainer.
    """

    identity: str
    progress: Progress
    trainer: dict[str, object]


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

    def load(self) -> StoredRun | None:
        """Read the checkpoint and cut the log back to it; ``None`` if there is none.

        Raises:
            ValueError: The checkpoint belongs to a run with other options.
        """
        path = self.folder / STATE_FILE
        log = self.folder / LOG_FILE
        if not path.is_file():
            log.unlink(missing_ok=True)
            return None
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored = cast(StoredRun, {**content, "progress": Progress(**content["progress"])})
        if stored["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds a run with other options; give another folder, or delete {path.name}"
            )
        rows = [row for row in self.rows() if row["step"] < stored["progress"].done]
        write_atomically(log, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return stored

    def save(self, trainer: Mapping[str, object], progress: Progress) -> None:
        """Write the checkpoint."""
        content = io.BytesIO()
        torch.save({"identity": self.identity, "progress": asdict(progress), "trainer": dict(trainer)}, content)
        write_atomically(self.folder / STATE_FILE, content.getvalue())

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
    write_atomically(out / CONFIG_FILE, (json.dumps(dict(config), indent=2) + "\n").encode())
    write_atomically(out / TRANSFORMER_FILE, save(transformer))
    write_atomically(out / TEXT_FILE, save(rest))
    write_atomically(out / VOCABULARY_FILE, vocabulary.encode())
    for name, content in extra.items():
        write_atomically(out / name, content)
