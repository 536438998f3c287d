"""The kernel of landmark attention as it is shipped, for ``tests/aot.py``."""

from typing import Any

import triton.language as tl
from attn_kernels.landmark.fused import kernel_config, landmark_fwd_kernel
from attn_kernels.targets import TARGETS

STRIDES = tuple(f"stride_{name}{axis}" for name in "qkv" for axis in "bhn")


def case(name: str, half: bool, width: int, block: int, absent: str) -> dict[str, Any]:
    """Describe the kernel for one head width, with keys gathered (no ``BIAS``) or pooled (no ``INDEX``)."""
    options = {}
    for target in TARGETS:
        config = kernel_config(target, half, width > 128)
        constants = {"BLOCK_M": config.queries, "BLOCK_N": config.keys, "STAGES": config.stages}
        options[target] = {"num_warps": config.warps, "num_stages": config.stages, "constants": constants}
    element = "*bf16" if half else "*fp32"
    pointers = {"Q": element, "K": element, "V": element, "OUT": element, "LSE": "*fp32", "INDEX": "*i64"}
    pointers["BIAS"] = "*fp32"
    del pointers[absent]
    return {
        "name": name,
        "kernel": landmark_fwd_kernel,
        "pointers": pointers,
        "constants": {
            absent: None,
            "WIDTH": width,
            "VALUES": width,
            "BLOCK_D": block,
            "BLOCK_V": block,
            "OPERAND": tl.bfloat16 if half else tl.float32,
            "INTERPRET": False,
        },
        "floats": {"scale": "fp32"},
        "divisible": STRIDES,
        "options": options,
        "mma": half,
        "targets": TARGETS if half else ("sm89", "gfx942"),
    }


def cases() -> list[dict[str, Any]]:
    """Return strided and pooled landmarks at common head widths."""
    return [
        case("strided 128", True, 128, 128, "BIAS"),
        case("pooled 128", True, 128, 128, "INDEX"),
        case("pooled 64", True, 64, 64, "INDEX"),
        case("pooled 72", True, 72, 128, "INDEX"),
        case("strided 256", True, 256, 256, "BIAS"),
        case("pooled fp32", False, 128, 128, "INDEX"),
        case("pooled fp32 256", False, 256, 256, "INDEX"),
    ]
