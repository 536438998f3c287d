"""Features of a three-layer network with a backward pass that keeps little and may multiply in half precision."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

ROW_VALUES = 4
"""Values of the hidden width that are kept per token until the backward pass: two before and two after the SiLU."""
_CPU_ROWS = 512
"""Tokens that are mapped at a time without gradient on a CPU."""


def mlp_features(
    x: Tensor, weights: Sequence[Tensor], *, normalise: bool, norm_eps: float, products: torch.dtype | None
) -> Tensor:
    """Evaluate ``elu(w3 silu(w2 silu(w1 x + b1) + b2) + b3) + 1``, differentiable in ``x`` and in the weights.

    The formula of ``attn_kernels.MlpFeatureMap``. Features, their norm and all gradients are in the dtype of ``x``; the
    activations kept for the backward pass are in ``products``.

    Args:
        x: ``[..., D]``.
        weights: ``w1 [hidden, D]``, ``b1``, ``w2 [hidden, hidden]``, ``b2``, ``w3 [F, hidden]``, ``b3``.
        normalise: Divide the features of a token by their L2 norm.
        norm_eps: Added to that norm.
        products: Dtype of the matrix products, forward and backward; that of ``x`` if ``None``.

    Returns:
        ``[..., F]`` in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    features: Tensor = _MlpFeatures.apply(rows, *weights, normalise, norm_eps, products or x.dtype)  # type: ignore[no-untyped-call]
    return features.view(*x.shape[:-1], features.shape[-1])


def mlp_features_alone(
    x: Tensor, weights: Sequence[Tensor], *, normalise: bool, norm_eps: float, products: torch.dtype | None
) -> Tensor:
    """Evaluate ``mlp_features`` without gradient, some rows at a time, so that hidden values stay in the caches.

    Arguments as there: x ``[..., D]``, features ``[..., F]``.
    """
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        cast = [weight.to(products or x.dtype) for weight in weights]
        block = _CPU_ROWS if x.device.type == "cpu" else max(1, len(rows))
        features = rows.new_empty(len(rows), len(cast[-1]))
        for some, into in zip(torch.split(rows, block), torch.split(features, block), strict=True):
            into.copy_(mlp_features(some, cast, normalise=normalise, norm_eps=norm_eps, products=products))
        return features.view(*x.shape[:-1], features.shape[-1])


@lru_cache(maxsize=8)
def native_products(device: torch.device) -> torch.dtype | None:
    """Return ``bfloat16`` where a device multiplies it faster than float32, else ``None``."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type != "cpu":
        return None
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return torch.bfloat16 if any(check is not None and check() for check in checks) else None


class _MlpFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        normalise: bool,
        norm_eps: float,
        products: torch.dtype,
    ) -> Tensor:
        inside, cast1, cast2, cast3 = x.to(products), w1.to(products), w2.to(products), w3.to(products)
        before1 = functional.linear(inside, cast1, b1.to(products))
        after1 = functional.silu(before1)
        before2 = functional.linear(after1, cast2, b2.to(products))
        after2 = functional.silu(before2)
        features = functional.linear(after2, cast3, b3.to(products)).to(x.dtype)
        features = functional.elu(features, inplace=True).add_(1.0)
        # The derivative of elu(z) + 1 is 1 above zero and the feature itself below.
        slope = features.clamp_max(1.0)
        size = None
        if normalise:
            size = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
            features = features.div_(size + norm_eps)
        kept = (inside, before1, after1, before2, after2, features, slope, size, cast1, cast2, cast3)
        ctx.save_for_backward(*kept)  # type: ignore[arg-type]
        ctx.norm_eps = norm_eps  # type: ignore[attr-defined]
        return features

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        inside, before1, after1, before2, after2, features, slope, size, w1, w2, w3 = saved
        if size is not None:
            along = (gradient * features).sum(dim=-1, keepdim=True) / size
            norm_eps: float = ctx.norm_eps  # type: ignore[attr-defined]
            gradient = torch.addcmul(gradient / (size + norm_eps), features, along, value=-1.0)
        wide = gradient.dtype
        gradient = (gradient * slope).to(w3.dtype)
        d3, c3 = gradient.T @ after2, gradient.sum(dim=0)
        gradient = torch.ops.aten.silu_backward(gradient @ w3, before2)
        d2, c2 = gradient.T @ after1, gradient.sum(dim=0)
        gradient = torch.ops.aten.silu_backward(gradient @ w2, before1)
        d1, c1 = gradient.T @ inside, gradient.sum(dim=0)
        needed: Sequence[bool] = ctx.needs_input_grad  # type: ignore[attr-defined]
        outward = (gradient @ w1).to(wide) if needed[0] else None
        return outward, *(part.to(wide) for part in (d1, c1, d2, c2, d3, c3)), None, None, None
