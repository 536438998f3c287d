"""The near-far kernels as they are launched, for compilation without a GPU."""

import triton
from attn_kernels.near_far.fused import padded_width, pool_blocks, select_blocks, select_precision
from attn_kernels.near_far.fused_attend import near_far_fwd_kernel
from attn_kernels.near_far.fused_config import attend_config
from attn_kernels.near_far.fused_pool import near_far_plan_kernel, near_far_pool_kernel, near_far_select_kernel
from attn_kernels.near_far.fused_tables import group_shape
from attn_kernels.targets import TARGETS

TABLES = dict.fromkeys(("TILES", "GROUPS", "RANGES", "OUTSIDE", "CHOSEN", "CHOSEN_COUNT", "SELECTION"), "*i32")
WIDE = dict.fromkeys(("LSE", "POOLED_BIAS", "MEAN_Q", "MEAN_K", "TEMPERATURE", "BIAS"), "*fp32")


def pointers(kernel, dtype):
    kinds = {**TABLES, **WIDE, **dict.fromkeys(("Q", "K", "V", "OUT", "POOLED_K", "POOLED_V"), dtype), "KEEP": "*u8"}
    return {name: kinds[name] for name in kernel.arg_names if name in kinds}


def strides(kernel):
    return tuple(name for name in kernel.arg_names if name.startswith("stride_"))


def widths(width, value_width):
    padded = {"BLOCK_D": padded_width(width), "BLOCK_V": padded_width(value_width)}
    return {"HEAD_DIM": width, "VALUE_DIM": value_width, **padded}


def attend_case(tile, top_k, width, dtype="bf16", masked=False):
    fixed = {"TILE_R": tile, "TILE_C": tile, "RADIUS": 1, "EXACT": True, "NEGATIVE": False, "MASKED": masked}
    options = {}
    for target in TARGETS:
        launch = attend_config(target, dtype != "fp32", padded_width(width), tile * tile)
        group = group_shape((tile, tile), launch.queries, top_k)
        sizes = {
            "GROUP_R": group[0],
            "GROUP_C": group[1],
            "LIST": triton.next_power_of_2(group[0] * group[1] * top_k) if top_k else 0,
            "PARTS": triton.cdiv(group[0] * group[1] * tile * tile, launch.queries),
            "BLOCK_M": launch.queries,
            "BLOCK_N": launch.keys,
            "STAGES": launch.stages,
        }
        options[target] = {"num_warps": launch.warps, "num_stages": launch.stages, "constants": sizes}
    return {
        "name": f"attend-{dtype}-d{width}-t{tile}-k{top_k}{'-masked' if masked else ''}",
        "kernel": near_far_fwd_kernel,
        "pointers": pointers(near_far_fwd_kernel, f"*{dtype}"),
        "constants": {**fixed, **widths(width, width), "INTERPRET": False},
        "floats": {"scale": "fp32"},
        "divisible": strides(near_far_fwd_kernel),
        "options": options,
        "mma": "wgmma" if dtype != "fp32" else False,
    }


def pool_case(tile, width, masked=False):
    fixed = {"TILE_R": tile, "TILE_C": tile, "SELECT": True, "CORRECTED": masked, "MASKED": masked}
    return {
        "name": f"pool-d{width}-t{tile}{'-masked' if masked else ''}",
        "kernel": near_far_pool_kernel,
        "pointers": pointers(near_far_pool_kernel, "*bf16"),
        "constants": {**fixed, **widths(width, width), **pool_blocks((tile, tile), padded_width(width))},
        "floats": {"unit": "fp32"},
        "divisible": strides(near_far_pool_kernel),
        "options": {"default": {"num_warps": 4}},
        "mma": False,
    }


def select_case(top_k, width):
    sizes = {"TOP_K": top_k, "SLOTS": triton.next_power_of_2(top_k), "RADIUS": 1, **select_blocks()}
    return {
        "name": f"select-k{top_k}-d{width}",
        "kernel": near_far_select_kernel,
        "pointers": pointers(near_far_select_kernel, "*bf16"),
        "constants": {**sizes, "HEAD_DIM": width, "PRECISION": select_precision(False)},
        "floats": {"scale": "fp32"},
        "options": {
            "default": {"num_warps": 8},
            "gfx942": {"num_warps": 8, "constants": {"PRECISION": select_precision(True)}},
        },
        "mma": True,
    }


def plan_case(top_k, group):
    slots = triton.next_power_of_2(top_k * group[0] * group[1])
    sizes = {"TOP_K": top_k, "GROUP_R": group[0], "GROUP_C": group[1], "RADIUS": 1, "LIST": slots}
    return {
        "name": f"plan-k{top_k}-{group[0]}x{group[1]}",
        "kernel": near_far_plan_kernel,
        "pointers": pointers(near_far_plan_kernel, "*bf16"),
        "constants": sizes,
        "options": {"default": {"num_warps": 4 if slots > 16 else 1}},
        "mma": False,
    }


def cases():
    return [
        attend_case(8, 2, 128),
        attend_case(4, 8, 128),
        attend_case(8, 0, 64),
        attend_case(4, 8, 64, dtype="fp16", masked=True),
        attend_case(8, 2, 96, masked=True),
        attend_case(8, 2, 160),
        attend_case(8, 2, 128, dtype="fp32"),
        pool_case(8, 128),
        pool_case(4, 64, masked=True),
        select_case(8, 128),
        select_case(2, 64),
        plan_case(2, (1, 2)),
        plan_case(8, (2, 2)),
    ]
