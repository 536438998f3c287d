"""Attention through feature maps, arranged for speed: a few hundred tokens of one head at a time stay in the caches."""

from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.kernel_regression.feature_map import FeatureMap, HedgehogFeatureMap, MlpFeatureMap
from attn_kernels.kernel_regression.normaliser import divide, drop_empty_rows, key_shift
from attn_kernels.partial import Partial

_CPU_BLOCK = 512
"""Tokens of one head handled at a time on a CPU: their hidden values and features fit the second-level cache."""
_DEVICE_BYTES = 1 << 27
"""Bytes of one layer's values handled at a time on an accelerator, where a block must be large enough to fill it."""


def feature_map_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    key_mask: Tensor | None,
    eps: float,
    map_dtype: torch.dtype | None,
    chunk: int,
) -> Partial:
    """Compute ``feature_map_attention`` block by block, without gradient; half precision is computed in float32.

    Arguments as in ``feature_map_attention``, checked.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    with torch.no_grad():
        dtype = torch.promote_types(q.dtype, torch.float32)
        inner = map_dtype or dtype
        batch, heads, queries, _ = q.shape
        step, block = _block(heads, max(_widest(map_q), _widest(map_k)), chunk, q.device)
        # One cast and one packing of the weights serve all blocks.
        map_q, map_k = _packed(map_q.to(inner), block), _packed(map_k.to(inner), block)
        shift = key_shift(k, map_k, key_mask=key_mask, map_dtype=map_dtype, chunk=chunk)
        out = v.new_empty(batch, heads, queries, v.shape[-1])
        lse = q.new_empty(batch, heads, queries, dtype=dtype)
        for row, first in product(range(batch), range(0, heads, step)):
            some = slice(first, min(first + step, heads))
            mask = None if key_mask is None else key_mask[row]
            own_shift = None if shift is None else shift[row, some]
            state, normaliser = _state(k[row, some], v[row, some], mask, own_shift, map_k, some, block, inner)
            for start in range(0, queries, block):
                x = q[row, some, start : start + block].to(dtype)
                features, total = _features(
                    map_q, x, some, None if own_shift is None else -own_shift, inner, largest=True
                )
                denominator = torch.matmul(features, normaliser.unsqueeze(-1)).squeeze(-1)
                part = divide(torch.matmul(features, state), denominator, total, eps)
                out[row, some, start : start + block] = part.out
                lse[row, some, start : start + block] = part.lse
        return drop_empty_rows(Partial(out, lse), key_mask)


def _block(heads: int, widest: int, chunk: int, device: torch.device) -> tuple[int, int]:
    """Choose how many heads and tokens are handled at a time."""
    if device.type == "cpu":
        return 1, min(chunk, _CPU_BLOCK)
    tokens = max(chunk, _DEVICE_BYTES // (4 * widest * heads))
    return heads, tokens


def _packed(feature_map: FeatureMap, rows: int) -> FeatureMap:
    """Lay the weights of a network out as oneDNN multiplies them, on a CPU where it has the dtype."""
    if not isinstance(feature_map, MlpFeatureMap) or feature_map.w1.device.type != "cpu":
        return feature_map
    if not torch.backends.mkldnn.enabled or not _packs(feature_map.w1.dtype):
        return feature_map
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return replace(feature_map, **{name: reorder(getattr(feature_map, name), rows) for name in ("w1", "w2", "w3")})


@lru_cache(maxsize=8)
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch multiplies packed weights of the dtype on this CPU, found out by trying."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight, bias = torch.eye(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        answer = torch.ops.mkldnn._linear_pointwise(weight, packed, bias, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(answer, weight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, *, silu: bool) -> Tensor:
    """Apply a linear layer; with packed weights bias and SiLU join the product before it leaves the registers."""
    if weight.is_mkldnn:
        answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "swish" if silu else "none", [], "")
        return answer
    y = F.linear(x, weight, bias)
    return F.silu(y, inplace=True) if silu else y


def _widest(feature_map: FeatureMap) -> int:
    """Return the widest layer of a map."""
    hidden = feature_map.hidden if isinstance(feature_map, MlpFeatureMap) else 0
    return max(hidden, feature_map.features)


def _state(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    shift: Tensor | None,
    map_k: FeatureMap,
    heads: slice,
    block: int,
    inner: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sum the features of keys ``[H, Nk, D]`` with values and alone.

    Returns:
        ``[H, F, Dv]`` and ``[H, F]`` in float32 (float64 for float64).
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    state = torch.zeros(len(k), map_k.features, v.shape[-1], dtype=dtype, device=k.device)
    normaliser = torch.zeros(len(k), map_k.features, dtype=dtype, device=k.device)
    for start in range(0, k.shape[1], block):
        keys, values = k[:, start : start + block].to(dtype), v[:, start : start + block].to(dtype)
        if mask is not None:
            drop = ~mask[start : start + block, None]
            keys, values = keys.masked_fill(drop, 0.0), values.masked_fill(drop, 0.0)
        features, _ = _features(map_k, keys, heads, shift, inner, largest=False)
        if mask is not None:
            features = features.masked_fill_(drop, 0.0)
        state.baddbmm_(features.transpose(-1, -2), values)
        normaliser += features.sum(dim=1)
    return state, normaliser


def _features(
    feature_map: FeatureMap, x: Tensor, heads: slice, shift: Tensor | None, inner: torch.dtype, *, largest: bool
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a map in few passes over memory.

    Args:
        feature_map: The map, weights in ``inner``.
        x: ``[H, n, D]`` of the heads ``heads``.
        heads: Which heads ``x`` holds.
        shift: ``[H, 1, F]``, subtracted from the exponents of an ``"exp"`` map, else ``None``.
        inner: Dtype of the linear layers.
        largest: Subtract each token's largest exponent too, after ``shift``.

    Returns:
        ``[H, n, F]`` in the dtype of ``x``, and the largest exponents ``[H, n]`` that were subtracted, or ``None``.
    """
    inside = x.to(inner)
    if isinstance(feature_map, HedgehogFeatureMap):
        y = torch.matmul(inside, feature_map.weight[heads].transpose(-1, -2))
        if feature_map.bias is not None:
            y += feature_map.bias[heads].unsqueeze(-2)
        half = y.shape[-1]
        features = x.new_empty(*y.shape[:-1], 2 * half)
        features[..., :half] = y
        torch.neg(features[..., :half], out=features[..., half:])
        if feature_map.kind == "softmax":
            for part in (features[..., :half], features[..., half:]):
                part.copy_(part.softmax(dim=-1))
            return features, None
        peak = None
        if shift is not None:
            features -= shift
        if largest:
            peak = features.amax(dim=-1, keepdim=True)
            features -= peak
        return features.exp_(), None if peak is None else peak.squeeze(-1)
    hidden = _linear(inside, feature_map.w1, feature_map.b1, silu=True)
    hidden = _linear(hidden, feature_map.w2, feature_map.b2, silu=True)
    features = _linear(hidden, feature_map.w3, feature_map.b3, silu=False).to(x.dtype)
    features = F.elu(features, inplace=True).add_(1.0)
    if feature_map.normalise:
        features.div_(torch.linalg.vector_norm(features, dim=-1, keepdim=True).add_(feature_map.norm_eps))
    return features, None
