"""Which family of GPUs a device belongs to: the key of the tables of kernel configurations."""

from functools import lru_cache
from typing import Literal, get_args

import torch

Target = Literal["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942"]
"""NVIDIA by compute capability: A100, RTX 30, RTX 40, H100, B200, RTX 50; AMD MI300."""
TARGETS: tuple[Target, ...] = get_args(Target)

_SMALLEST: Target = "sm86"
"""The family with the least shared memory: a configuration that fits it fits everywhere."""
_CAPABILITIES: tuple[tuple[tuple[int, int], Target], ...] = (
    ((12, 0), "sm120"),
    ((10, 0), "sm100"),
    ((9, 0), "sm90"),
    ((8, 9), "sm89"),
    ((8, 6), "sm86"),
    ((8, 0), "sm80"),
)
"""Smallest compute capability of each family, the newest first."""


@lru_cache(maxsize=64)
def _cuda_target(index: int) -> Target:
    """Look up a device; its properties never change, so they are read once."""
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(index)
    return next((target for least, target in _CAPABILITIES if capability >= least), _SMALLEST)


def device_target(device: torch.device) -> Target:
    """Return the family whose configurations a device takes.

    A device of no listed family takes those of the closest older one; what is older than all of them, and Triton's
    interpreter, whose tensors are on the CPU, take those of ``"sm86"``: the least shared memory.

    Args:
        device: Where the tensors are.
    """
    if device.type != "cuda":
        return _SMALLEST
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
