"""What training gives up, in order, when device memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

import torch
from torch import nn

_QUERY_CHUNK = 32
_LANDMARK_CAP = 512
_SENTENCES = (
    "training as configured",
    "training on a quarter of the queries",
    f"training on one batch row and {_QUERY_CHUNK} queries at a time",
    "training with fewer landmarks",
    "training on the newest sample alone",
    "training is off, the teacher answers",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on most devices torch raises a plain ``RuntimeError`` then."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class MemoryLadder:
    """Five rungs of one layer, taken one at a time and never back within a run.

    0. as configured; 1. a quarter of the training queries, at least 32; 2. and one batch row and 32 queries at a time;
    3. and at most 512 landmarks, or half of the student's own limit; 4. and one stored sample; 5. no training: every
    call of the layer gets the teacher.

    Attributes:
        rung: The rung now.
    """

    OFF = len(_SENTENCES) - 1

    def __init__(self, rung: int = 0) -> None:
        if not 0 <= rung <= self.OFF:
            raise ValueError(f"rung must be 0 to {self.OFF}, got {rung}")
        self.rung = rung

    @property
    def off(self) -> bool:
        """Whether training is off."""
        return self.rung >= self.OFF

    def step_down(self) -> str:
        """Take the next rung and return what it means, for the log."""
        self.rung = min(self.OFF, self.rung + 1)
        return _SENTENCES[self.rung]

    def queries(self, cap: int) -> int:
        """Return how many training queries to keep of a call that may have ``cap``."""
        return cap if self.rung < 1 else min(cap, max(_QUERY_CHUNK, cap // 4))

    def rows(self, batch: int, generator: torch.Generator) -> slice:
        """Return the batch rows of an update."""
        if self.rung < 2:
            return slice(None)
        row = int(torch.randint(batch, (1,), generator=generator))
        return slice(row, row + 1)

    @property
    def query_chunk(self) -> int | None:
        """How many queries an update takes at a time; ``None`` = all."""
        return None if self.rung < 2 else _QUERY_CHUNK

    @property
    def kept_samples(self) -> int | None:
        """How many samples of the layer the replay may hold; ``None`` = as many as fit."""
        return None if self.rung < 4 else 1

    @contextmanager
    def fewer_landmarks(self, student: nn.Module) -> Iterator[None]:
        """Within this context the student uses as many landmarks as the rung allows.

        A student whose settings have no ``landmark_maximum`` stays as it is.
        """
        settings: object = getattr(student, "config", None)
        limit = _landmark_limit(settings) if self.rung >= 3 else None
        if limit is None or not is_dataclass(settings) or isinstance(settings, type):
            yield
            return
        # Set like any attribute that is neither a parameter nor a module.
        object.__setattr__(student, "config", replace(settings, landmark_maximum=limit))
        try:
            yield
        finally:
            object.__setattr__(student, "config", settings)


def _landmark_limit(settings: object) -> int | None:
    """Return the limit on landmarks of the third rung; 0 among the settings means that there is none."""
    if not is_dataclass(settings) or "landmark_maximum" not in {field.name for field in fields(settings)}:
        return None
    own: int = getattr(settings, "landmark_maximum", 0)
    least: int = getattr(settings, "landmark_minimum", 1)
    return max(least, own // 2 if own else _LANDMARK_CAP)
