"""The one place of shape, dtype and device errors.

Every check reads metadata only (never values), so none of them waits for the device.
"""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q, k and v can be attended.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.

    Raises:
        ValueError: Wrong rank, sizes, dtype or device; the message names the tensor and its shape.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOAT_DTYPES and tensor.dtype is not torch.float64:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, q is {q.dtype}; cast one of them")
    if q.shape[:2] != k.shape[:2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            "q, k and v must share batch and heads, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; repeat grouped keys and values first"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must share the head width, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have the same number of tokens, got {k.shape[2]} and {v.shape[2]}")
    if k.shape[2] == 0:
        raise ValueError("k has no tokens; attention over nothing is undefined")


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    """Check a key mask ``[B, Nk]`` of dtype bool (True = keep) against k ``[B, H, Nk, D]``.

    Raises:
        ValueError: Wrong dtype, shape or device.
    """
    if key_mask is None:
        return
    if key_mask.dtype is not torch.bool:
        raise ValueError(f"key_mask must be bool with True = keep, got {key_mask.dtype}; write mask != 0 or mask == 0")
    expected = (k.shape[0], k.shape[2])
    if tuple(key_mask.shape) != expected:
        raise ValueError(f"key_mask must be [B, Nk] = {expected}, got {tuple(key_mask.shape)}")
    if key_mask.device != k.device:
        raise ValueError(f"key_mask is on {key_mask.device}, k is on {k.device}")


def resolve_scale(scale: float | None, head_width: int) -> float:
    """Return the score scale: the given one, else ``1 / sqrt(head_width)``.

    Raises:
        ValueError: The scale is not a finite number.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_width)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)
