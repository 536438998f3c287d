"""Block sizes of the near-far kernels, stored per family of GPUs."""

from dataclasses import dataclass

from attn_kernels.targets import Target


@dataclass(frozen=True)
class AttendConfig:
    """How the attention kernel is cut into programs.

    Attributes:
        queries: Queries of a program.
        keys: Keys of a block.
        warps: Warps of a program.
        stages: Stages of the software pipeline over blocks of keys.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def attend_config(target: Target, half: bool, width: int, tile_tokens: int) -> AttendConfig:
    """Return the stored configuration of the attention kernel.

    Args:
        target: Family of GPUs.
        half: Operands in bfloat16 or float16; else float32, computed without matrix instructions of less precision.
        width: The larger of the padded widths of keys and values.
        tile_tokens: Tokens of a full tile. Small tiles share a program with few others, because each brings its own
            chosen tiles; a tile of 64 tokens shares the loads of its neighbours with one more.
    """
    if not half:
        return AttendConfig(32, 32, 8, 1) if width <= 64 else AttendConfig(32, 16, 8, 1)
    small = tile_tokens < 64
    if target == "gfx942":
        return AttendConfig(64, 64 if width <= 64 else 32, 4, 1)
    if target == "sm120":
        return AttendConfig(64, 32, 4 if width <= 64 else 8, 2)
    if width > 128 or target in ("sm86", "sm89", "sm120"):
        return AttendConfig(64, 64 if width <= 64 and not small else 32, 4 if width <= 128 else 8, 2)
    if small:
        return AttendConfig(64, 32, 4, 2) if target == "sm80" else AttendConfig(64, 64 if width <= 64 else 32, 4, 3)
    return AttendConfig(128, 32 if target == "sm80" else 64, 8, 3)
