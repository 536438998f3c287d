"""The Taylor kernels with their stored configurations, for compilation ahead of time."""

import torch
import triton.language as tl
from attn_kernels.targets import TARGETS
from attn_kernels.taylor.fused_centring import taylor_key_mean_kernel, taylor_sum_kernel, taylor_turn_kernel
from attn_kernels.taylor.fused_config import RESIDENT_QUERIES, resident_warps, taylor_launch
from attn_kernels.taylor.fused_kernels import (
    taylor_query_kernel,
    taylor_reduce_kernel,
    taylor_state_kernel,
    taylor_unrank_kernel,
)
from attn_kernels.taylor.fused_resident import taylor_resident_kernel

_DTYPES = {"bf16": (torch.bfloat16, tl.bfloat16), "fp32": (torch.float32, tl.float32)}
_WIDE = ("stride_b", "stride_h", "stride_n", "pitch", "span")


def _divisible(kernel):
    return tuple(name for name in _WIDE if name in kernel.arg_names)


def _before(dtype, width):
    """Kernels before the features: they multiply no matrices."""
    pointers = {"X": f"*{dtype}", "K": f"*{dtype}", "XT": f"*{dtype}", "MASK": "*u8"}
    for name in ("SUM", "QMEAN", "PEAK", "TOTAL", "MEAN", "DIRECTION", "SHIFT", "DOT"):
        pointers[name] = "*fp32"
    constants = {
        **{"D": width, "BD": width, "BN": 64, "HAS_MASK": True},
        **{"DTYPE": _DTYPES[dtype][1], "INTERPRET": False, "KEYS": True},
    }
    for kernel in (taylor_sum_kernel, taylor_key_mean_kernel, taylor_turn_kernel):
        yield {
            "name": f"{kernel.fn.__name__} {dtype} {width}",
            "kernel": kernel,
            "pointers": {name: kind for name, kind in pointers.items() if name in kernel.arg_names},
            "constants": {name: value for name, value in constants.items() if name in kernel.arg_names},
            "floats": {name: "fp32" for name in ("scale", "root") if name in kernel.arg_names},
            "divisible": _divisible(kernel),
            "options": {"default": {"num_warps": 4}},
            "mma": False,
        }


def _features(kernel, dtype, width, columns, terms, **constants):
    """State, reduction and query kernel of one shape."""
    torch_dtype, triton_dtype = _DTYPES[dtype]
    sums = {"Z", "W", "OFFSET", "TOTAL", "NUM", "DEN", "LSE", "WEIGHT", "ZSUM"}
    sums |= {"S"} if kernel is not taylor_query_kernel else set()
    pointers = dict.fromkeys(sums | {"FACTOR"}, "*fp32") | dict.fromkeys(
        {"KT", "QT", "V", "OUT", "SUM", "S"} - sums, f"*{dtype}"
    )
    pointers |= {"TABLE": "*i32", "MASK": "*u8"}
    options = {}
    for target in TARGETS:
        launch = taylor_launch(target, torch_dtype, columns, terms)
        stages = launch.stages if constants.get("HAS_V", True) else 1
        features = launch.query_features(fitted=constants.get("FITTED", False))
        sizes = {
            **{"BF": features, "BE": min(columns, launch.columns), "BN": launch.tokens},
            **{"BQ": launch.queries, "STAGES": stages},
        }
        options[target] = {
            "num_warps": 4 if kernel is taylor_reduce_kernel else launch.warps,
            "num_stages": stages,
            "constants": {name: value for name, value in sizes.items() if name in kernel.arg_names},
        }
    values = {
        **{"D": width, "DV": columns, "DEGREE": terms - 1, "HAS_MASK": True, "HAS_V": True, "FINISH": True},
        **{"FITTED": False},
        **{"DTYPE": triton_dtype, "INTERPRET": False},
        **constants,
    }
    what = " ".join(f"{name.lower()}={value}" for name, value in constants.items())
    return {
        "name": f"{kernel.fn.__name__} {dtype} {width}x{columns} terms {terms} {what}".strip(),
        "kernel": kernel,
        "pointers": {name: kind for name, kind in pointers.items() if name in kernel.arg_names},
        "constants": {name: value for name, value in values.items() if name in kernel.arg_names},
        "floats": {name: "fp32" for name in ("eps", "share") if name in kernel.arg_names},
        "divisible": _divisible(kernel),
        "options": options,
        "mma": dtype != "fp32" and kernel is not taylor_reduce_kernel and values["HAS_V"],
    }


def _resident():
    """The kernel for 4 terms in 16 coordinates."""
    pointers = dict.fromkeys(("QT", "S3", "S2", "S1", "Z3", "Z2", "OUT"), "*bf16")
    pointers |= dict.fromkeys(("S0", "Z1", "OFFSET", "TOTAL", "LSE"), "*fp32")
    return {
        "name": "taylor_resident_kernel bf16 16x16",
        "kernel": taylor_resident_kernel,
        "pointers": pointers,
        "constants": {"DV": 16, "BQ": RESIDENT_QUERIES, "DTYPE": tl.bfloat16, "INTERPRET": False},
        "floats": {"eps": "fp32"},
        "divisible": _divisible(taylor_resident_kernel),
        "options": {target: {"num_warps": resident_warps(target), "num_stages": 1} for target in TARGETS},
        "targets": tuple(target for target in TARGETS if resident_warps(target)),
    }


def cases():
    """Return every shipped form; widths between two powers of two pad to the larger."""
    found = [
        {
            "name": "taylor_unrank_kernel",
            "kernel": taylor_unrank_kernel,
            "pointers": {"TABLE": "*i32", "WEIGHT": "*fp32"},
            "constants": {"DEGREE": 7, "BF": 128},
            "ints": {"first": "i64"},
            "options": {"default": {"num_warps": 4}},
            "mma": False,
        },
        *_before("bf16", 16),
        *_before("bf16", 128),
        *_before("fp32", 128),
    ]
    shapes = [
        *(("bf16", 16, 16, 3), ("bf16", 32, 64, 4), ("bf16", 128, 128, 3), ("bf16", 16, 128, 8)),
        *(("fp32", 16, 64, 4), ("fp32", 16, 64, 8)),
    ]
    for kernel in (taylor_state_kernel, taylor_reduce_kernel, taylor_query_kernel):
        found += [_features(kernel, *shape) for shape in shapes]
    found += [
        _features(kernel, "bf16", 16, 16, 4, HAS_V=False) for kernel in (taylor_state_kernel, taylor_query_kernel)
    ]
    found += [_features(taylor_query_kernel, dtype, 16, 128, 4, FITTED=True) for dtype in ("bf16", "fp32")]
    return [*found, _resident(), _features(taylor_query_kernel, "bf16", 128, 128, 3, FINISH=False)]
