"""The kernel of hybrid attention that no other operator has, for compilation ahead of time."""

import torch
import triton.language as tl
from attn_kernels.hybrid.fused import TURN_WARPS, columns
from attn_kernels.hybrid.fused_kernels import hybrid_turn_kernel
from attn_kernels.taylor.fused_tokens import TOKENS

_DTYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
_TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SUMS = ("BASIS", "MEAN", "DIRECTION", "SHIFT", "DOT")


def _case(dtype, width, rank, project):
    return {
        "name": f"hybrid_turn_kernel {dtype} {width} to {rank}" if project else f"hybrid_turn_kernel {dtype} {width}",
        "kernel": hybrid_turn_kernel,
        "pointers": {"X": f"*{dtype}", "XT": f"*{dtype}", "MASK": "*u8", **dict.fromkeys(_SUMS, "*fp32")},
        "constants": {
            **{"D": width, "BD": width, "BC": columns(_TORCH[dtype]), "BN": TOKENS, "RANK": rank, "BR": max(16, rank)},
            **{"PROJECT": project, "KEYS": True, "HAS_MASK": True, "DTYPE": _DTYPES[dtype], "INTERPRET": False},
        },
        "floats": {"root": "fp32", "scale": "fp32"},
        "divisible": ("stride_b", "stride_h", "stride_n", "pitch"),
        "options": {"default": {"num_warps": TURN_WARPS}},
        "mma": dtype != "fp32" and project,
    }


def cases():
    """Return every shipped form; the window kernels that follow it are among those of ``window``."""
    return [
        _case("bf16", 128, 16, True),
        _case("bf16", 128, 32, True),
        _case("fp32", 128, 32, True),
        _case("bf16", 128, 1, False),
    ]
