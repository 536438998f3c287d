"""Block sizes of the kernels of kernel regression, per family of GPUs."""

from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton.language as tl

from attn_kernels.targets import Target

_PROGRAMS = 512
"""Programs that a state kernel should have: enough to fill the largest devices twice over."""
_SPLIT = 256
"""Fewest keys of a split."""


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel is cut into blocks.

    Attributes:
        rows: Tokens of a block; for the state, features; 0 = all features.
        columns: Columns of the result of a block; for the states, tokens.
        inner: Step along the axis that is summed.
        warps: Warps of a block.
        stages: Stages of the software pipeline.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


_HALF = MappingProxyType(
    {
        ("mlp_hidden", "default"): KernelConfig(128, 128, 32, 8, 2),
        ("mlp_hidden", "sm80"): KernelConfig(128, 128, 32, 8, 3),
        ("mlp_hidden", "sm90"): KernelConfig(128, 256, 32, 8, 3),
        ("mlp_hidden", "sm100"): KernelConfig(128, 128, 64, 8, 3),
        ("mlp_hidden", "gfx942"): KernelConfig(64, 128, 32, 8, 1),
        ("mlp_features", "default"): KernelConfig(128, 128, 32, 8, 3),
        ("mlp_features", "sm90"): KernelConfig(128, 128, 64, 8, 3),
        ("mlp_features", "sm100"): KernelConfig(128, 128, 64, 8, 3),
        ("mlp_features", "gfx942"): KernelConfig(64, 128, 32, 8, 1),
        ("mlp_readout", "default"): KernelConfig(64, 64, 32, 4, 2),
        ("mlp_readout", "sm80"): KernelConfig(64, 64, 64, 4, 3),
        ("mlp_readout", "sm90"): KernelConfig(128, 64, 64, 8, 3),
        ("mlp_readout", "sm100"): KernelConfig(128, 64, 64, 8, 3),
        ("mlp_readout", "gfx942"): KernelConfig(64, 64, 32, 4, 1),
        ("state", "default"): KernelConfig(64, 64, 0, 4, 2),
        ("state", "sm80"): KernelConfig(64, 64, 0, 4, 3),
        ("state", "sm90"): KernelConfig(64, 64, 0, 4, 3),
        ("state", "sm100"): KernelConfig(128, 64, 0, 8, 3),
        ("state", "gfx942"): KernelConfig(64, 64, 0, 4, 1),
        ("hedgehog_state", "default"): KernelConfig(0, 32, 0, 8, 2),
        ("hedgehog_state", "sm90"): KernelConfig(0, 64, 0, 8, 2),
        ("hedgehog_state", "sm100"): KernelConfig(0, 64, 0, 8, 2),
        ("hedgehog_state", "gfx942"): KernelConfig(0, 32, 0, 8, 1),
        ("hedgehog_readout", "default"): KernelConfig(64, 128, 0, 8, 1),
        ("hedgehog_readout", "sm90"): KernelConfig(128, 64, 0, 8, 1),
    }
)
_FULL = MappingProxyType(
    {
        ("mlp_hidden", "default"): KernelConfig(64, 64, 16, 8, 1),
        ("mlp_features", "default"): KernelConfig(64, 64, 16, 8, 1),
        ("mlp_readout", "default"): KernelConfig(32, 32, 16, 8, 1),
        ("state", "default"): KernelConfig(32, 16, 0, 8, 1),
        ("hedgehog_state", "default"): KernelConfig(0, 16, 0, 8, 1),
        ("hedgehog_readout", "default"): KernelConfig(16, 128, 0, 8, 1),
        ("hedgehog_readout", "gfx942"): KernelConfig(64, 128, 0, 8, 1),
    }
)


def kernel_config(kernel: str, target: Target, half: bool) -> KernelConfig:
    """Return the stored configuration of a kernel.

    Args:
        kernel: ``"mlp_hidden"``, ``"mlp_features"``, ``"mlp_readout"``, ``"state"``, ``"hedgehog_state"`` or
            ``"hedgehog_readout"``.
        target: Family of GPUs.
        half: Operands in bfloat16 or float16; else float32, which has no matrix instructions in full precision.

    Raises:
        KeyError: There is no such kernel.
    """
    table = _HALF if half else _FULL
    return table[(kernel, target)] if (kernel, target) in table else table[(kernel, "default")]


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return what Triton calls a dtype of operands."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def key_splits(blocks: int, tokens: int) -> tuple[int, int]:
    """Return how many splits of the keys fill a device, and the keys of each.

    Args:
        blocks: Programs of one split.
        tokens: Keys.
    """
    splits = max(1, min(-(-_PROGRAMS // blocks), tokens // _SPLIT))
    per_split = -(-tokens // splits)
    per_split = -(-per_split // 64) * 64
    return -(-tokens // per_split), per_split
