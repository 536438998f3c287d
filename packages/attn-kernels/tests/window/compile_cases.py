"""The window kernels with their stored configurations, for compilation ahead of time."""

import torch
import triton.language as tl
from attn_kernels.targets import TARGETS
from attn_kernels.window.fused_config import window_launch
from attn_kernels.window.fused_kernels import window_2d_fwd_kernel, window_fwd_kernel

_DTYPES = {"bf16": (torch.bfloat16, tl.bfloat16), "fp32": (torch.float32, tl.float32)}
_ROWS = ("stride_qn", "stride_kn", "stride_vn", "stride_on", "stride_an", "stride_wn")


def _case(kernel, dtype, width, masked):
    torch_dtype, triton_dtype = _DTYPES[dtype]
    two_dimensional = kernel is window_2d_fwd_kernel
    extra = ("KOUT", "VOUT") if two_dimensional else ()
    pointers = dict.fromkeys(("Q", "K", "V", "OUT", *extra), f"*{dtype}")
    pointers |= dict.fromkeys(("MASK", "MOUT") if two_dimensional else ("MASK",), "*u8")
    options = {}
    for target in TARGETS:
        launch = window_launch(target, torch_dtype, width, masked)
        shape = {"TR": launch.rows, "TC": launch.columns} if two_dimensional else {"BM": launch.queries}
        options[target] = {
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "constants": {**shape, "BN": launch.keys, "STAGES": launch.stages},
        }
    return {
        "name": f"{kernel.fn.__name__} {dtype} {width}{' masked' if masked else ''}",
        "kernel": kernel,
        "pointers": {**pointers, "LSE": "*fp32"},
        "constants": {
            **{"D": width, "DV": width, "BD": width, "BDV": width},
            **{"HAS_MASK": masked, "DTYPE": triton_dtype, "INTERPRET": False},
        },
        "floats": {"scale_log2": "fp32"},
        "divisible": tuple(name for name in kernel.arg_names if name.startswith("stride")),
        "options": options,
        "mma": dtype != "fp32",
    }


def cases():
    """Return every shipped form of both kernels; widths between two powers of two pad to the larger."""
    forms = [("bf16", 64, False), ("bf16", 128, False), ("bf16", 128, True), ("bf16", 256, True)]
    forms += [("fp32", 64, False), ("fp32", 128, True), ("fp32", 256, False)]
    return [_case(kernel, *form) for kernel in (window_fwd_kernel, window_2d_fwd_kernel) for form in forms]
