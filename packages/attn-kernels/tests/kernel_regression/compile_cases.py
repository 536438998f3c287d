"""Kernels of kernel regression as they are shipped, for ``tests/aot.py``: D = 128, hidden 512, F = 256."""

from typing import Any

import torch
import triton.language as tl
from attn_kernels.kernel_regression.fused_config import kernel_config
from attn_kernels.kernel_regression.fused_hedgehog import hedgehog_readout_fwd_kernel, hedgehog_state_fwd_kernel
from attn_kernels.kernel_regression.fused_mlp import (
    mlp_features_fwd_kernel,
    mlp_hidden_fwd_kernel,
    mlp_readout_fwd_kernel,
)
from attn_kernels.kernel_regression.fused_state import state_fwd_kernel
from attn_kernels.targets import TARGETS

KERNELS = {
    "mlp_hidden": mlp_hidden_fwd_kernel,
    "mlp_features": mlp_features_fwd_kernel,
    "mlp_readout": mlp_readout_fwd_kernel,
    "state": state_fwd_kernel,
    "hedgehog_state": hedgehog_state_fwd_kernel,
    "hedgehog_readout": hedgehog_readout_fwd_kernel,
}
SHAPES = {"WIDTH": 128, "HIDDEN": 512, "FEATURES": 256, "VALUES": 128, "HALF": 128}
BLOCKS = {"BLOCK_D": 128, "BLOCK_V": 128, "BLOCK_G": 128, "NORMALISE": True, "INTERPRET": False}
FIELDS = {
    "mlp_hidden": {"BLOCK_M": "rows", "BLOCK_N": "columns", "BLOCK_J": "inner"},
    "mlp_features": {"BLOCK_M": "rows", "BLOCK_F": "columns", "BLOCK_K": "inner"},
    "mlp_readout": {"BLOCK_M": "rows", "BLOCK_F": "columns", "BLOCK_K": "inner"},
    "state": {"BLOCK_F": "rows", "BLOCK_N": "columns"},
    "hedgehog_state": {"BLOCK_N": "columns"},
    "hedgehog_readout": {"BLOCK_M": "rows", "BLOCK_V": "columns"},
}
FULL = ("B1", "B2", "B3", "WEIGHT", "STATE", "SUMS", "SCALE", "LSE", "BIAS", "SHIFT")
"""Pointers that are float32 whatever the operands are."""
STRIDES = ("stride_xb", "stride_xh", "stride_xn", "stride_vb", "stride_vh", "stride_vn")
MORE_STRIDES = ("stride_ob", "stride_oh", "stride_on", "stride_kb", "stride_kh", "stride_kn")
QUERY_STRIDES = ("stride_qb", "stride_qh", "stride_qn")


def options(name: str, half: bool) -> dict[str, dict[str, Any]]:
    """Return the stored configuration of each target."""
    found = {}
    for target in TARGETS:
        config = kernel_config(name, target, half)
        constants = {argument: getattr(config, field) for argument, field in FIELDS[name].items()}
        if "STAGES" in KERNELS[name].arg_names:
            constants["STAGES"] = config.stages
        if "APPROXIMATE" in KERNELS[name].arg_names:
            constants["APPROXIMATE"] = half and target != "gfx942"
        found[target] = {"num_warps": config.warps, "num_stages": config.stages, "constants": constants}
    return found


def case(name: str, dtype: torch.dtype, **constants: Any) -> dict[str, Any]:
    """Describe one kernel with operands of one dtype."""
    kernel, half = KERNELS[name], dtype is torch.bfloat16
    operand = tl.bfloat16 if half else tl.float32
    known = {**SHAPES, **BLOCKS, "OPERAND": operand, "STATE_OPERAND": operand, **constants}
    arguments = kernel.arg_names
    pointers = {}
    for argument in ("X", "W1", "W2", "W3", "H2", "PHI", "Q", "K", "V", "W", "OUT", *FULL):
        if argument in arguments and argument not in constants:
            full = argument in FULL and not (argument == "STATE" and "readout" in name)
            pointers[argument] = "*fp32" if full or not half else "*bf16"
    if "KEEP" in arguments and "KEEP" not in constants:
        pointers["KEEP"] = "*u8"
    floats = {argument: "fp32" for argument in ("norm_eps", "eps", "log_eps") if argument in arguments}
    return {
        "name": " ".join([name, "bf16" if half else "fp32", *(f"{key}={value}" for key, value in constants.items())]),
        "kernel": kernel,
        "pointers": pointers,
        "constants": {argument: value for argument, value in known.items() if argument in arguments},
        "floats": floats,
        "divisible": tuple(x for x in (*STRIDES, *MORE_STRIDES, *QUERY_STRIDES) if x in arguments),
        "options": options(name, half),
        "mma": half,
        # The block sizes of float32 do not depend on the target; one of each vendor stands for all.
        "targets": TARGETS if half else ("sm89", "gfx942"),
    }


def cases() -> list[dict[str, Any]]:
    """Return every kernel with bfloat16 operands and with float32 ones."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name in ("mlp_hidden", "mlp_features", "mlp_readout", "state"):
            found.append(case(name, dtype))
        for softmax in (True, False):
            for name in ("hedgehog_state", "hedgehog_readout"):
                found.append(case(name, dtype, SOFTMAX=softmax))
    return found
