"""Attention through a positive feature map, in time linear in the tokens."""

import torch
from torch import Tensor

from attn_kernels.checks import FLOAT_DTYPES, check_key_mask, check_qkv
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.kernel_regression.feature_map import FeatureMap, HedgehogFeatureMap, MlpFeatureMap, check_map
from attn_kernels.kernel_regression.map_blocked import feature_map_blocked
from attn_kernels.kernel_regression.map_reference import CHUNK, feature_map_reference
from attn_kernels.kernel_regression.reference import kernel_regression_reference
from attn_kernels.partial import Partial
from attn_kernels.targets import Target
from attn_kernels.triton_support import refuse_fused

_FAILING: tuple[tuple[int, int], Target] = ((3, 5), "sm100")
"""A version of Triton that fails on the network's kernels in half precision, and the GPUs for which it does."""


def kernel_regression(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Average the values with weights ``phi_q . phi_k`` (Katharopoulos et al. 2020, eq. 5; Nadaraya-Watson regression).

    ``out_i = phi_i (sum_j phi_j v_j^T) / max(phi_i . sum_j phi_j, eps)``, summed in float32. The features must not be
    negative; that is not checked, since it would wait for the device.

    Args:
        phi_q: ``[B, H, Nq, F]``, features of the queries.
        phi_k: ``[B, H, Nk, F]``, features of the keys.
        v: ``[B, H, Nk, Dv]``.
        key_mask: ``[B, Nk]`` bool, True = keep. A row whose keys are all masked gets zeros and ``lse`` ``-inf``.
        eps: Smallest denominator.
        impl: Only the reference exists; it is differentiable and its memory is bounded.

    Returns:
        ``Partial``; its ``lse`` is the logarithm of the denominator, so that the features' weights can share one
        denominator with weights ``exp(score)``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or ``eps`` is not positive.
    """
    # Features and values may differ in dtype; a view without columns stands for the values in the check.
    check_qkv(phi_q, phi_k, v[..., :0].to(phi_q.dtype))
    check_key_mask(key_mask, phi_k)
    _check_eps(eps)
    resolve_impl(impl, {Impl.REFERENCE: None})
    return kernel_regression_reference(phi_q, phi_k, v, key_mask=key_mask, eps=eps)


def feature_map_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap | None = None,
    *,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    map_dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Average the values with weights ``phi_q(q) . phi_k(k)``; the features never exist for all tokens at once.

    ``kernel_regression`` of ``map_q(q)`` and ``map_k(k)``, in memory bounded by inputs, outputs and one chunk, in the
    backward pass too. Queries and keys go into the maps as they are, without a scale.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        map_q: Feature map of the queries.
        map_k: Feature map of the keys, with as many features; that of the queries if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. A row whose keys are all masked gets zeros and ``lse`` ``-inf``.
        eps: Smallest denominator.
        map_dtype: Dtype in which the linear layers of the maps are multiplied; sums over tokens stay float32. ``None``:
            float32 (float64 for float64) in torch, the dtype of ``q`` in the fused form.
        chunk: Tokens handled at a time, in torch; the fused form has its own budget.
        impl: ``"fused"`` (Triton), ``"blocked"`` (fast torch), ``"reference"`` (differentiable), or ``"auto"``: the
            first of these that can run here.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 (or float64) ``lse``, the
        logarithm of the denominator.

    Raises:
        ValueError: Shapes, dtypes, devices or maps do not fit, or ``impl`` cannot run here.
    """
    map_k = map_q if map_k is None else map_k
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    check_map("map_q", map_q, q)
    check_map("map_k", map_k, k)
    _check_eps(eps)
    if map_q.features != map_k.features:
        raise ValueError(f"map_q has {map_q.features} features, map_k has {map_k.features}; they must be as many")
    if _is_exp(map_q) != _is_exp(map_k):
        raise ValueError("an 'exp' map needs one on the other side: their exponents are scaled against each other")
    if map_dtype is not None and (map_dtype not in FLOAT_DTYPES or q.dtype is torch.float64):
        raise ValueError(f"map_dtype must be float32, bfloat16 or float16 and q not float64, got {map_dtype}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    gradient = _refuse_gradient(q, k, v, map_q, map_k)
    half = (q.dtype if map_dtype is None else map_dtype) is not torch.float32
    failing = _FAILING if half and isinstance(map_q, MlpFeatureMap) else None
    fused = gradient or refuse_fused(impl, q, k, v, failing=failing) or _refuse_fused_maps(q, v, map_q, map_k)
    chosen = resolve_impl(impl, {Impl.FUSED: fused, Impl.BLOCKED: gradient, Impl.REFERENCE: None})
    if chosen is Impl.FUSED:
        from attn_kernels.kernel_regression.fused import feature_map_fused

        return feature_map_fused(q, k, v, map_q, map_k, key_mask=key_mask, eps=eps, map_dtype=map_dtype)
    form = feature_map_blocked if chosen is Impl.BLOCKED else feature_map_reference
    return form(q, k, v, map_q, map_k, key_mask=key_mask, eps=eps, map_dtype=map_dtype, chunk=chunk)


def _check_eps(eps: float) -> None:
    """Check that the smallest denominator is positive."""
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}")


def _is_exp(feature_map: FeatureMap) -> bool:
    """Tell whether features are exponentials without a bound."""
    return isinstance(feature_map, HedgehogFeatureMap) and feature_map.kind == "exp"


def _refuse_gradient(q: Tensor, k: Tensor, v: Tensor, map_q: FeatureMap, map_k: FeatureMap) -> str | None:
    """Say that a form without gradient cannot run, or ``None``."""
    if torch.is_grad_enabled() and max(x.requires_grad for x in (q, k, v, *map_q.weights, *map_k.weights)):
        return "it has no gradient and an input or a weight requires one; use the reference, or torch.no_grad()"
    return None


def _refuse_fused_maps(q: Tensor, v: Tensor, map_q: FeatureMap, map_k: FeatureMap) -> str | None:
    """Say why the kernels cannot serve these maps, or ``None``."""
    if q.dtype is torch.float64:
        return "it has no float64"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"its largest head width is 256, got {q.shape[-1]} and {v.shape[-1]}"
    if type(map_q) is not type(map_k):
        return "the maps of queries and keys are of two kinds"
    if isinstance(map_q, HedgehogFeatureMap) and map_q.features > 256:
        return f"its Hedgehog maps have at most 256 features, got {map_q.features}"
    return None
