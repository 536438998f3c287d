"""What training gives up, in order, when device memory runs out."""

import torch


class MemoryLadder:
    """Three rungs, taken one at a time and never back.

    0. as configured; 1. a quarter of the training queries (at least 32); 2. one batch row per update as well;
    3. no training: every call gets the teacher.

    Attributes:
        rung: The rung now.
    """

    OFF = 3

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
        return (
            "training as configured",
            "training on a quarter of the queries",
            "training on one batch row at a time",
            "training is off, the teacher answers",
        )[self.rung]

    def queries(self, cap: int) -> int:
        """Return how many training queries to keep of a call that may have ``cap``."""
        return cap if self.rung < 1 else min(cap, max(32, cap // 4))

    def rows(self, batch: int, generator: torch.Generator) -> slice:
        """Return the batch rows of an update."""
        if self.rung < 2:
            return slice(None)
        row = int(torch.randint(batch, (1,), generator=generator))
        return slice(row, row + 1)
