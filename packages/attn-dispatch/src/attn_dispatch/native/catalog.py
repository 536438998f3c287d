"""The backends: what each is called, where it comes from, what it takes, and in which order a device prefers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from attn_dispatch.native import bindings
from attn_dispatch.native.arch import NVIDIA, Arch, Tier
from attn_dispatch.native.kind import CallKind

SDPA = "sdpa"
"""The backend that is always there: torch chooses among its own kernels."""

_HALF = (torch.float16, torch.bfloat16)
_FLOAT = (*_HALF, torch.float32)
_MODERN = frozenset({Tier.AMPERE, Tier.HOPPER, Tier.BLACKWELL})
_GPUS = NVIDIA | {Tier.ROCM}

# Relative L2 errors of a probe's output. They tell broken from whole, not good from better: an output that has
# nothing to do with the right one is off by about 1.4, the mean of v by about 0.9.
_EXACT = 0.02
_EIGHT_BITS = 0.12
_FOUR_BITS = 0.35


@dataclass(frozen=True)
class Candidate:
    """One package that can be a backend.

    Attributes:
        key: Unique name.
        backend: Name of the backend it can be; several candidates may share one.
        label: What runs, in words.
        module: Module to import.
        bind: Makes kernels from it.
        tiers: Devices it runs on.
        capability: Smallest compute capability; ignored off NVIDIA.
        majors: The only major compute capabilities it runs on; empty = all from ``capability``.
        dtypes: Dtypes it takes.
        widest: Largest head width.
        multiple: What the head width must be a multiple of.
        masks: Whether it may take a mask; its kernels have the last word.
        dropout: Whether it has dropout.
        gradient: Whether its output is differentiable.
        grouped: Whether k and v may have fewer heads than q.
        value_width: Whether v may have another width than q and k.
        quantised: It computes in 8 bits or fewer.
        tolerance: Largest relative L2 error of a probe.
    """

    key: str
    backend: str
    label: str
    module: str
    bind: bindings.Binder
    tiers: frozenset[Tier]
    capability: tuple[int, int] = (0, 0)
    majors: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = _HALF
    widest: int = 256
    multiple: int = 1
    masks: bool = False
    dropout: bool = False
    gradient: bool = False
    grouped: bool = False
    value_width: bool = False
    quantised: bool = False
    tolerance: float = _EXACT

    def refuses_device(self, arch: Arch) -> str | None:
        """Say why this candidate cannot run on such a device; ``None`` if it may."""
        if arch.tier not in self.tiers:
            return f"does not run on {arch}"
        if arch.tier in NVIDIA:
            if arch.capability < self.capability:
                return f"needs compute capability {self.capability[0]}.{self.capability[1]}, this is {arch}"
            if self.majors and arch.capability[0] not in self.majors:
                majors = " or ".join(f"{major}.x" for major in self.majors)
                return f"needs compute capability {majors}, this is {arch}"
        return None

    def refuses_kind(self, kind: CallKind) -> str | None:
        """Say why this candidate cannot answer such calls; ``None`` if it may."""
        if kind.dtype not in self.dtypes:
            return f"does not take {str(kind.dtype).removeprefix('torch.')}"
        if kind.width > self.widest or kind.width % self.multiple:
            limit = f"up to {self.widest}" + (f" in steps of {self.multiple}" if self.multiple > 1 else "")
            return f"takes head widths {limit}, not {kind.width}"
        if kind.value_width != kind.width and not self.value_width:
            return f"takes no values of another width ({kind.value_width}) than the keys ({kind.width})"
        for wanted, has, what in (
            (kind.masked, self.masks, "takes no mask"),
            (kind.dropout, self.dropout, "has no dropout"),
            (kind.gradient, self.gradient, "has no gradient"),
            (kind.grouped, self.grouped, "takes no grouped heads"),
        ):
            if wanted and not has:
                return what
        return None


_everywhere = frozenset(Tier)
_torch = partial(Candidate, module="torch", dtypes=_FLOAT, dropout=True, gradient=True)

CANDIDATES: tuple[Candidate, ...] = (
    Candidate(
        "sage3", "sage3", "SageAttention 3 (FP4)", "sageattn3", bindings.bind_sage3, frozenset({Tier.BLACKWELL}),
        widest=255, quantised=True, tolerance=_FOUR_BITS,
    ),
    Candidate(
        "flash_fp8", "flash_fp8", "FlashAttention 3 (FP8)", "flash_attn_interface", bindings.bind_flash3_fp8,
        frozenset({Tier.HOPPER}), (9, 0), multiple=16, grouped=True, quantised=True, tolerance=_EIGHT_BITS,
    ),
    Candidate(
        "flash4_fp8", "flash_fp8", "FlashAttention 4 (FP8)", "flash_attn.cute", bindings.bind_flash4_fp8,
        frozenset({Tier.BLACKWELL}), (10, 0), (10,), widest=128, multiple=16, grouped=True, quantised=True,
        tolerance=_EIGHT_BITS,
    ),
    Candidate(
        "sage2", "sage2", "SageAttention 2 (INT8)", "sageattention", bindings.bind_sage, _MODERN | {Tier.ROCM},
        (8, 0), widest=128, masks=True, grouped=True, quantised=True, tolerance=_EIGHT_BITS,
    ),
    Candidate(
        "ck_int8", "ck_int8", "comfy-kitchen (INT8)", "comfy_kitchen", bindings.bind_comfy_kitchen, _GPUS, (7, 5),
        dtypes=_FLOAT, masks=True, grouped=True, quantised=True, tolerance=_EIGHT_BITS,
    ),
    Candidate(
        "flash4", "flash4", "FlashAttention 4", "flash_attn.cute", bindings.bind_flash4, _MODERN, (8, 0),
        multiple=8, gradient=True, grouped=True, value_width=True,
    ),
    Candidate(
        "flash3", "flash", "FlashAttention 3", "flash_attn_interface", bindings.bind_flash3,
        frozenset({Tier.HOPPER}), (9, 0), multiple=8, gradient=True, grouped=True,
    ),
    Candidate(
        "flash2", "flash", "FlashAttention 2", "flash_attn", bindings.bind_flash2, _MODERN | {Tier.ROCM}, (8, 0),
        dropout=True, gradient=True, grouped=True,
    ),
    Candidate(
        "xformers", "xformers", "xFormers", "xformers.ops", bindings.bind_xformers, _GPUS, (6, 0), dtypes=_FLOAT,
        masks=True, dropout=True, gradient=True, value_width=True,
    ),
    Candidate(
        "flex", "flex", "PyTorch FlexAttention", "torch.nn.attention.flex_attention", bindings.bind_flex,
        _MODERN | {Tier.ROCM, Tier.XPU}, (8, 0), dtypes=_FLOAT, gradient=True, grouped=True, value_width=True,
    ),
    _torch("sdpa_flash", "sdpa_flash", "PyTorch SDPA (flash)", bind=bindings.bind_sdpa_flash,
           tiers=_MODERN | {Tier.ROCM, Tier.XPU}, capability=(8, 0), dtypes=_HALF, multiple=8),
    _torch("sdpa_flash_cpu", "sdpa_flash", "PyTorch SDPA (flash for CPU)", bind=bindings.bind_sdpa_flash_cpu,
           tiers=frozenset({Tier.CPU}), widest=1024, masks=True, dropout=False),
    _torch("sdpa_cudnn", "sdpa_cudnn", "PyTorch SDPA (cuDNN)", bind=bindings.bind_sdpa_cudnn, tiers=_MODERN,
           capability=(8, 0), dtypes=_HALF, multiple=8, masks=True),
    _torch("sdpa_efficient", "sdpa_efficient", "PyTorch SDPA (memory-efficient)", bind=bindings.bind_sdpa_efficient,
           tiers=_GPUS, multiple=8, masks=True, value_width=True),
    _torch("sdpa_math", "sdpa_math", "PyTorch SDPA (math)", bind=bindings.bind_sdpa_math, tiers=_everywhere,
           dtypes=(*_FLOAT, torch.float64), widest=2**31, masks=True, grouped=True, value_width=True),
)  # fmt: skip
"""Every candidate but ``SDPA`` itself, in the order in which tables list them."""

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sage": ("sage3", "sage2"), "flash_attn": ("flash", "flash4")}
)
"""Names that mean the first of several backends that runs."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "comfy_kitchen_int8": "ck_int8",
        "flash_attention": "flash_attn",
        "flash_attn_fp8": "flash_fp8",
        "flex_attention": "flex",
        "pytorch": SDPA,
        "sage_attn": "sage",
        "sageattention": "sage",
        "sageattn": "sage",
    }
)
"""Other spellings."""

PRIORITY: Mapping[Tier, tuple[str, ...]] = MappingProxyType(
    {
        Tier.BLACKWELL: ("sage3", "flash_fp8", "sage2", "ck_int8", "flash4", "flash"),
        Tier.HOPPER: ("flash_fp8", "sage2", "ck_int8", "flash", "flash4"),
        Tier.AMPERE: ("sage2", "ck_int8", "flash"),
        Tier.OLDER: (),
        Tier.ROCM: ("sage2", "ck_int8", "flash"),
        Tier.XPU: (),
        Tier.MPS: (),
        Tier.CPU: (),
    }
)
"""What ``auto`` tries before ``SDPA``."""


def backend_names() -> tuple[str, ...]:
    """Return every name that ``select`` takes, aliases left out."""
    backends = dict.fromkeys(candidate.backend for candidate in CANDIDATES)
    keys = (candidate.key for candidate in CANDIDATES)
    return tuple(dict.fromkeys(("auto", *GROUPS, *backends, *keys, SDPA)))


def canonical_name(name: str) -> str:
    """Return the name that an alias stands for, or the name itself.

    Raises:
        ValueError: There is no such backend.
    """
    found = ALIASES.get(name, name)
    if found not in backend_names():
        raise ValueError(f"there is no attention backend {name!r}; there are {', '.join(backend_names())}")
    return found


def candidates(name: str, arch: Arch) -> tuple[Candidate, ...]:
    """Return what a name may mean on such a device, best first; ``SDPA``, the last resort, is left out.

    Args:
        name: ``"auto"``, a group, a backend or the key of a candidate.
        arch: The device.
    """
    if name == "auto":
        backends = PRIORITY[arch.tier]
    else:
        backends = GROUPS.get(name, (name,))
        if name == "flash_attn" and arch.tier is Tier.BLACKWELL:
            backends = backends[::-1]
    return tuple(one for backend in backends for one in CANDIDATES if backend in (one.backend, one.key))
