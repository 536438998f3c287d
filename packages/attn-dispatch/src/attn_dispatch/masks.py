"""What a host's attention mask means: which keys may be seen, or what is added to the scores.

Everything here reads shapes, strides and dtypes, never values, so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_misfit(mask: Tensor, shape: tuple[int, int, int, int]) -> str | None:
    """Say why a mask cannot belong to scores of this shape.

    Args:
        mask: Broadcastable to ``[B, H, Nq, Nk]``; bool (True = keep) or float (added to the scaled scores).
        shape: ``(B, H, Nq, Nk)``.

    Returns:
        ``None`` if it fits, else one sentence.
    """
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        return f"the mask has dtype {mask.dtype}, neither bool nor float"
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) > 4 or any(have not in (1, want) for have, want in zip(sizes, shape, strict=True)):
        return "the mask does not broadcast to the scores"
    return None


def split_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Read a host mask as a key mask or as a bias.

    A bool mask that is the same for every head and query by its shape or strides is a key mask. Any other bool mask
    becomes a float32 bias of zero and ``-inf``; a float mask is a bias as it stands.

    Args:
        mask: Broadcastable to ``[B, H, Nq, Nk]``; bool (True = keep) or float (added to the scaled scores).
        shape: ``(B, H, Nq, Nk)``.

    Returns:
        ``(key_mask, attn_bias)``: ``[B, Nk]`` bool or ``None``, and 4-D broadcastable to ``shape`` or ``None``.

    Raises:
        ValueError: The mask does not fit.
    """
    if mask is None:
        return None, None
    misfit = mask_misfit(mask, shape)
    if misfit is not None:
        raise ValueError(f"{misfit}: mask {tuple(mask.shape)}, scores {shape}")
    batch, _, _, keys = shape
    wide = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype is not torch.bool:
        return None, wide
    if all(wide.shape[axis] == 1 or wide.stride(axis) == 0 for axis in (1, 2)):
        return wide[:, 0, 0, :].expand(batch, keys), None
    bias = torch.zeros(wide.shape, dtype=torch.float32, device=mask.device)
    return None, bias.masked_fill(~wide, -torch.inf)


def join_mask(key_mask: Tensor | None, attn_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Make the one mask that ``scaled_dot_product_attention`` takes; undoes ``split_mask``.

    Args:
        key_mask: ``[B, Nk]`` bool, True = keep.
        attn_bias: Broadcastable to ``[B, H, Nq, Nk]``.
        dtype: Dtype of the queries, which a float mask must have.

    Returns:
        ``None``, a bool mask ``[B, 1, 1, Nk]``, or a float mask of ``dtype`` broadcastable to ``[B, H, Nq, Nk]``.
    """
    keep = None if key_mask is None else key_mask[:, None, None, :]
    if attn_bias is None:
        return keep
    bias = attn_bias.to(dtype)
    return bias if keep is None else bias.masked_fill(~keep, -torch.inf)
