"""Stored block sizes of the window kernels."""

from dataclasses import dataclass

import torch

from attn_kernels.targets import Target


@dataclass(frozen=True)
class WindowLaunch:
    """How a window kernel is cut and launched.

    Attributes:
        rows: Rows of a rectangle of queries (2-D).
        columns: Columns of that rectangle; ``rows * columns`` queries belong to a program, in 1-D too.
        keys: Keys handled at a time.
        warps: Warps of a program.
        stages: Key blocks in flight.
    """

    rows: int
    columns: int
    keys: int
    warps: int
    stages: int

    @property
    def queries(self) -> int:
        """Queries of a program."""
        return self.rows * self.columns


def window_launch(target: Target, dtype: torch.dtype, width: int, masked: bool, series: bool = False) -> WindowLaunch:
    """Return the stored configuration.

    Args:
        target: Architecture.
        dtype: Dtype of the queries.
        width: The wider of keys and values, a power of two.
        masked: Whether there is a key mask.
        series: Whether a series speaks for the keys that are not seen.
    """
    if dtype is torch.float32:
        # Products in full float32 run on the ordinary cores, which keep whole operands in registers.
        if series:
            many = width <= 64 and target not in ("sm100", "sm120")
            return WindowLaunch(4, 8 if many else 4, 16, 8, 1)
        if width > 128:
            return WindowLaunch(4, 4, 16, 8 if target == "sm80" else 4, 1)
        return WindowLaunch(4, 8, 16, 8, 1) if width > 64 else WindowLaunch(4, 8, 32, 4, 1)
    if target == "gfx942":
        return WindowLaunch(8, 16, 32, 8, 1) if width <= 128 and not series else WindowLaunch(8, 8, 32, 4, 1)
    if width > 128:
        return WindowLaunch(8, 8, 32, 8, 2)
    if series:
        # The scores of the series stand beside the others, in registers or in tensor memory.
        stages = 3 if target in ("sm80", "sm90") else 2
        many = width <= 64 or (target == "sm90" and not masked) or target == "sm100"
        return WindowLaunch(8, 16 if many else 8, 32, 8, stages)
    if target == "sm100":
        return WindowLaunch(8, 16, 64, 8, 3)
    if target in ("sm80", "sm90"):
        # The test of every pair and the mask of the keys leave few registers for 64 keys.
        narrow = width > 64 and (masked or target == "sm80")
        return WindowLaunch(8, 16, 32 if narrow else 64, 8, 3)
    return WindowLaunch(8, 16, 64 if width <= 64 else 32, 8, 2)
