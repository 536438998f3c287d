"""The window kernels with their stored configurations, for compilation ahead of time."""

import torch
import triton.language as tl
from attn_kernels.targets import TARGETS
from attn_kernels.window.fused_config import window_launch
from attn_kernels.window.fused_kernels import window_2d_fwd_kernel, window_fwd_kernel

_DTYPES = {"bf16": (torch.bfloat16, tl.bfloat16), "fp32": (torch.float32, tl.float32)}
_ROWS = ("stride_qn", "stride_kn", "stride_vn", "stride_on", "stride_an", "stride_wn")


def _case(kernel, dtype, width, masked, rank=0, terms=0):
    torch_dtype, triton_dtype = _DTYPES[dtype]
    two_dimensional = kernel is window_2d_fwd_kernel
    extra = ("KOUT", "VOUT") if two_dimensional else ()
    pointers = dict.fromkeys(("Q", "K", "V", "OUT", *extra), f"*{dtype}")
    pointers |= dict.fromkeys(("MASK", "MOUT") if two_dimensional else ("MASK",), "*u8")
    series = ("QLOW", "OFFSET", "NUM", "DEN", "KLOW", "KWEIGHT", *(("LOUT", "WOUT") if two_dimensional else ()))
    low = dict.fromkeys([name for name in series if name in ("QLOW", "KLOW", "LOUT")], f"*{dtype}" if rank else "*fp32")
    words = [kernel.fn.__name__, dtype, str(width)]
    words += ["masked"] * masked + [f"series {rank}, {terms}"] * (rank > 0)
    options = {}
    for target in TARGETS:
        launch = window_launch(target, torch_dtype, width, masked, rank > 0)
        shape = {"TR": launch.rows, "TC": launch.columns} if two_dimensional else {"BM": launch.queries}
        options[target] = {
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "constants": {**shape, "BN": launch.keys, "STAGES": launch.stages},
        }
    return {
        "name": " ".join(words),
        "kernel": kernel,
        "pointers": {**pointers, "LSE": "*fp32", **dict.fromkeys(series, "*fp32"), **low},
        "constants": {
            **{"D": width, "DV": width, "BD": width, "BDV": width},
            **{"HAS_MASK": masked, "DTYPE": triton_dtype, "INTERPRET": False},
            **{"RANK": rank, "BR": max(16, rank), "TERMS": terms},
        },
        "floats": {"scale_log2": "fp32", "weight": "fp32", "share": "fp32"},
        "divisible": tuple(name for name in kernel.arg_names if name.startswith(("stride", "pitch"))),
        "options": options,
        "mma": dtype != "fp32",
    }


def cases():
    """Return every shipped form of both kernels; widths between two powers of two pad to the larger."""
    forms = [("bf16", 64, False), ("bf16", 128, False), ("bf16", 128, True), ("bf16", 256, True)]
    forms += [("fp32", 64, False), ("fp32", 128, True), ("fp32", 256, False)]
    forms += [("bf16", 128, False, 16, 3), ("bf16", 64, False, 16, 3), ("bf16", 128, True, 32, 5)]
    forms += [("fp32", 64, True, 32, 5), ("fp32", 128, True, 32, 4)]
    return [_case(kernel, *form) for kernel in (window_fwd_kernel, window_2d_fwd_kernel) for form in forms]
