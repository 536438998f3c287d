"""Kernels by which ``aot.py`` itself is tested: a sound one, and one for each fault that it must report."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    A, B, C, steps, stride, scale, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr = 1
):
    """Sum ``steps`` products of ``[M, K]`` by ``[K, N]``."""
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        a = tl.load(A + step * M * K + row[:, None] * K + inner[None, :])
        b = tl.load(B + step * K * N + inner[:, None] * N + column[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + row[:, None] * stride + column[None, :], total * scale)


@triton.jit
def three_products_kernel(A, B, C, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Keep three accumulators alive: more columns than the tensor memory of sm100 has."""
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    first = tl.zeros((M, N), tl.float32)
    second = tl.zeros((M, N), tl.float32)
    third = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        a = tl.load(A + step * M * K + row[:, None] * K + inner[None, :])
        b = tl.load(B + step * K * N + inner[:, None] * N + column[None, :])
        first = tl.dot(a, b, first)
        second = tl.dot(a, b + b, second)
        third = tl.dot(a + a, b, third)
    place = C + row[:, None] * N + column[None, :]
    tl.store(place, first)
    tl.store(place + M * N, second)
    tl.store(place + 2 * M * N, third)


@triton.jit
def copy_kernel(A, C, steps, M: tl.constexpr):
    """Copy, without any product."""
    row = tl.arange(0, M)
    tl.store(C + row, tl.load(A + row, mask=row < steps, other=0.0), mask=row < steps)


@triton.jit
def misshapen_kernel(A, B, C, M: tl.constexpr):
    """Multiply matrices whose shapes do not fit."""
    row = tl.arange(0, M)
    a = tl.load(A + row[:, None] * M + row[None, :])
    b = tl.load(B + row[:, None] * 16 + tl.arange(0, 16)[None, :])
    tl.store(C + row[:, None] * 16 + tl.arange(0, 16)[None, :], tl.dot(b, a))


def cases() -> list[dict[str, Any]]:
    """Return the sound kernel and the others."""
    product = {
        "kernel": product_kernel,
        "pointers": {"A": "*bf16", "B": "*bf16", "C": "*fp32"},
        "constants": {"M": 64, "N": 64, "K": 64},
        "floats": {"scale": "fp32"},
        "divisible": ("stride",),
    }
    copy = {"kernel": copy_kernel, "pointers": {"A": "*bf16", "C": "*bf16"}, "constants": {"M": 256}}
    three = {"pointers": {"A": "*bf16", "B": "*bf16", "C": "*fp32"}, "constants": {"M": 128, "N": 256, "K": 64}}
    return [
        {"name": "sound", **product, "options": {"default": {"num_warps": 4, "num_stages": 2}}},
        {"name": "group", **product, "mma": "wgmma", "targets": ("sm90", "sm120")},
        {
            "name": "narrow",
            **product,
            "mma": "wgmma",
            "targets": ("sm90",),
            "options": {"sm90": {"constants": {"M": 16}}, "default": {}},
        },
        {"name": "copy", **copy, "mma": False, "targets": ("sm90", "gfx942")},
        {"name": "no product", **copy, "targets": ("sm80", "gfx942")},
        {"name": "spills", **product, "targets": ("sm80", "gfx942"), "options": SPILLING},
        {"name": "too much shared", **product, "targets": ("sm90", "gfx942"), "options": LARGE},
        {"name": "tensor memory", "kernel": three_products_kernel, **three, "targets": ("sm100",)},
        {
            "name": "misshapen",
            "kernel": misshapen_kernel,
            "pointers": {"A": "*bf16", "B": "*bf16", "C": "*fp32"},
            "constants": {"M": 64},
            "targets": ("sm90",),
        },
        {"name": "unknown name", **{**copy, "divisible": ("stride",)}, "targets": ("sm90",)},
        {"name": "no value", **{**product, "constants": {"M": 64, "N": 64}}, "targets": ("sm90",)},
    ]


SPILLING = {"default": {"num_warps": 1, "constants": {"M": 128, "N": 256, "K": 16}}}
LARGE = {"default": {"num_warps": 8, "num_stages": 4, "constants": {"M": 256, "N": 256, "K": 128, "STAGES": 4}}}
