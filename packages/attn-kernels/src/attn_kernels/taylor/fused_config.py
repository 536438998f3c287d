"""Stored block sizes of the Taylor kernels."""

from dataclasses import dataclass

import torch

from attn_kernels.targets import Target

RESIDENT_QUERIES = 64
"""Queries of a block of the kernel with resident sums."""
RESIDENT_ROUNDS = 4
"""Blocks that one of its programs answers after loading the sums."""


def resident_warps(target: Target) -> int | None:
    """Warps of one of its programs, or ``None`` where it is not used.

    Its accumulators take all of the tensor memory of sm100 or, with an older compiler, more than there is.
    """
    return {"sm100": None, "sm120": 8}.get(target, 4)


@dataclass(frozen=True)
class TaylorLaunch:
    """How the kernels of the features are cut and launched.

    Attributes:
        features: Features of a tile.
        columns: Most value columns of a tile.
        tokens: Keys handled at a time by the state kernel.
        queries: Queries of a program of the query kernel.
        warps: Warps of a program of either.
        stages: Tiles in flight.
    """

    features: int
    columns: int
    tokens: int
    queries: int
    warps: int
    stages: int

    def query_features(self, *, fitted: bool) -> int:
        """Features of a tile of the query kernel; coefficients per query wait in registers beside them."""
        return min(self.features, 32) if fitted else self.features


def taylor_launch(target: Target, dtype: torch.dtype, value_width: int, terms: int) -> TaylorLaunch:
    """Return the stored configuration.

    Args:
        target: Architecture.
        dtype: Dtype of the queries.
        value_width: Dv, a power of two.
        terms: P; a feature is the product of P - 1 loads, which wait in registers.
    """
    if dtype is torch.float32:
        # Products in full float32 run on the ordinary cores, which keep whole operands in registers.
        return TaylorLaunch(16, 32, 32, 64, 4, 1)
    large = target in ("sm80", "sm90", "sm100")
    if terms > 4:
        return TaylorLaunch(32, 64 if large or target == "gfx942" else 32, 64, 64, 8, 1)
    stages = 1 if target == "gfx942" else 2
    if value_width <= 16 and terms <= 3:
        return TaylorLaunch(64, 16, 64, 128 if target in ("sm90", "sm100") else 64, 4, stages)
    if value_width > 64:
        return TaylorLaunch(64, 128, 64, 64, 8, stages)
    return TaylorLaunch(64, 64, 64, 128 if large else 64, 8, stages)
