"""What a device is: its tier, its compute capability, and the dtype that models run best in on it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch


class Tier(StrEnum):
    """Family of devices that run the same attention packages."""

    BLACKWELL = "blackwell"
    """NVIDIA, compute capability 10.x to 12.x."""
    HOPPER = "hopper"
    """NVIDIA, compute capability 9.x."""
    AMPERE = "ampere"
    """NVIDIA Ampere and Ada, compute capability 8.x."""
    OLDER = "older"
    """NVIDIA before compute capability 8.0."""
    ROCM = "rocm"
    """AMD under ROCm, which torch calls ``cuda`` too."""
    XPU = "xpu"
    """Intel."""
    MPS = "mps"
    """Apple."""
    CPU = "cpu"
    """The host processor, and every device that is none of the others."""


NVIDIA = frozenset({Tier.BLACKWELL, Tier.HOPPER, Tier.AMPERE, Tier.OLDER})
"""Tiers with a CUDA compute capability."""


@dataclass(frozen=True)
class Arch:
    """A device as the catalog of backends sees it.

    Attributes:
        tier: Its family.
        capability: CUDA compute capability ``(major, minor)``; ``(0, 0)`` off NVIDIA.
    """

    tier: Tier
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of_capability(cls, major: int, minor: int) -> Arch:
        """Name the tier of a CUDA compute capability."""
        if major >= 10:
            return cls(Tier.BLACKWELL, (major, minor))
        if major == 9:
            return cls(Tier.HOPPER, (major, minor))
        return cls(Tier.AMPERE if major == 8 else Tier.OLDER, (major, minor))

    def __str__(self) -> str:
        if self.tier in NVIDIA:
            return f"{self.tier}, compute capability {self.capability[0]}.{self.capability[1]}"
        return str(self.tier)


@lru_cache(maxsize=64)
def detect_arch(device: torch.device) -> Arch:
    """Describe a device; asks its driver once."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return Arch(Tier.ROCM)
        return Arch.of_capability(*torch.cuda.get_device_capability(device))
    if device.type in (Tier.XPU, Tier.MPS):
        return Arch(Tier(device.type))
    return Arch(Tier.CPU)


def default_device() -> torch.device:
    """Return the device that models run on: the current accelerator where there is one, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            # A tensor's device has the index that its keys in caches need.
            return torch.empty(0, device=accelerator).device
    return torch.device("cpu")


def auto_detect_precision(device: torch.device | None = None) -> torch.dtype:
    """Return the dtype that inference runs best in on a device.

    Args:
        device: The device; ``default_device()`` if ``None``.

    Returns:
        bfloat16 from compute capability 8.0, under ROCm and on XPU; float16 on Volta, Turing and MPS; else float32.
    """
    arch = detect_arch(default_device() if device is None else device)
    return precision_of(arch)


def precision_of(arch: Arch) -> torch.dtype:
    """Return the dtype that inference runs best in on such a device."""
    if arch.tier is Tier.CPU:
        return torch.float32
    if arch.tier is Tier.MPS:
        return torch.float16
    if arch.tier is Tier.OLDER:
        return torch.float16 if arch.capability >= (7, 0) else torch.float32
    return torch.bfloat16
