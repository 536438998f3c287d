"""Denominators of feature maps: how far exponents are shifted, the division, and batches without keys."""

import math

import torch
from torch import Tensor

from attn_kernels.kernel_regression.feature_map import FeatureMap, HedgehogFeatureMap, exponents
from attn_kernels.partial import Partial


def key_shift(
    k: Tensor,
    map_k: FeatureMap,
    *,
    key_mask: Tensor | None,
    map_dtype: torch.dtype | None,
    chunk: int,
) -> Tensor | None:
    """Find the largest exponent of each feature of an ``"exp"`` map over the unmasked keys, without gradient.

    Keys' features divided by ``exp`` of it are at most 1, and queries' features times it keep every product, so that
    no exponent is too large or too small for its float.

    Returns:
        ``[B, H, 1, F]`` in float32 (float64 for float64), 0 where no key is kept; ``None`` for other maps.
    """
    if not isinstance(map_k, HedgehogFeatureMap) or map_k.kind != "exp":
        return None
    wide = torch.promote_types(k.dtype, torch.float32)
    shift = torch.full((*k.shape[:2], 1, map_k.features), -torch.inf, dtype=wide, device=k.device)
    with torch.no_grad():
        for start in range(0, k.shape[2], chunk):
            y = exponents(map_k, k[:, :, start : start + chunk].to(wide), map_dtype)
            if key_mask is not None:
                y = y.masked_fill(~key_mask[:, None, start : start + chunk, None], -torch.inf)
            shift = torch.maximum(shift, y.amax(dim=-2, keepdim=True))
    return torch.where(shift == -torch.inf, 0, shift)


def query_shift(x: Tensor, map_q: FeatureMap, shift: Tensor | None, map_dtype: torch.dtype | None) -> Tensor | None:
    """Find the largest exponent per query once those of the keys are added, without gradient.

    Args:
        x: ``[B, H, n, D]``, queries in float32 or float64.
        map_q: Their map.
        shift: What ``key_shift`` answered.
        map_dtype: Dtype of the linear layer; that of ``x`` if ``None``.

    Returns:
        ``[B, H, n, 1]``; ``None`` where ``shift`` is.
    """
    if shift is None or not isinstance(map_q, HedgehogFeatureMap):
        return None
    with torch.no_grad():
        return (exponents(map_q, x, map_dtype) + shift).amax(dim=-1, keepdim=True)


def divide(numerator: Tensor, denominator: Tensor, shift: Tensor | None, eps: float) -> Partial:
    """Divide by the denominator, at least ``eps``.

    Args:
        numerator: ``[B, H, n, Dv]``.
        denominator: ``[B, H, n]``.
        shift: ``[B, H, n]``: both are too small by the factor ``exp(shift)``; ``None`` = 0.
        eps: Smallest denominator, before the factor was taken out.

    Returns:
        ``Partial`` in the dtype of ``numerator``.
    """
    if shift is None:
        denominator = denominator.clamp_min(eps)
        return Partial(numerator / denominator.unsqueeze(-1), denominator.log())
    # The floor can leave the range of floats; a denominator of 0 would be NaN then.
    floor = torch.exp(math.log(eps) - shift).clamp_min(torch.finfo(shift.dtype).tiny)
    denominator = torch.maximum(denominator, floor)
    return Partial(numerator / denominator.unsqueeze(-1), denominator.log() + shift)


def drop_empty_rows(part: Partial, key_mask: Tensor | None) -> Partial:
    """Give the rows of a batch whose keys are all masked zeros and ``lse`` ``-inf``.

    Args:
        part: ``out`` ``[B, H, Nq, Dv]`` and ``lse`` ``[B, H, Nq]``.
        key_mask: ``[B, Nk]`` bool or ``None``.
    """
    if key_mask is None:
        return part
    empty = (key_mask.sum(dim=1) == 0)[:, None, None]
    return Partial(part.out.masked_fill(empty.unsqueeze(-1), 0), part.lse.masked_fill(empty, -torch.inf))


def mean_values(state: Tensor, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Split sums of features and values into what is safe to round: means of values, and weights of at most 1.

    Args:
        state: ``[B * H, ..., Dv]``, sums of features times values.
        sums: ``[B * H, ...]``, sums of features.
        dtype: Dtype of the means.

    Returns:
        Means ``state / sums`` in ``dtype`` (0 where a feature is 0 for all keys), weights ``sums / scale``, and
        ``scale [B * H]``, the largest sum (1 where all are 0).
    """
    empty = sums == 0
    means = (state / sums.masked_fill(empty, 1).unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0)
    scale = sums.flatten(1).amax(dim=1)
    scale = scale.masked_fill(scale == 0, 1)
    return means.to(dtype), sums / scale.view(-1, *[1] * (sums.ndim - 1)), scale
