"""Hybrid attention: exact near by, a low-rank Taylor series for all other keys."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale
from attn_kernels.grid import TokenGrid
from attn_kernels.hybrid.blocked import hybrid_blocked
from attn_kernels.hybrid.far import FarSettings, far_field
from attn_kernels.hybrid.near import Near
from attn_kernels.hybrid.projection import Projection
from attn_kernels.hybrid.reference import hybrid_reference
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.partial import Partial
from attn_kernels.taylor.api import taylor_attention
from attn_kernels.taylor.config import TaylorConfig, check_terms
from attn_kernels.triton_support import refuse_fused

Combine = Literal["shared", "additive"]


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Projection | None = None,
    *,
    low: tuple[Tensor, Tensor] | None = None,
    low_scale: float | None = None,
    window: int | None = None,
    prefix: int = 0,
    chunk: int = 1,
    grids: Sequence[TokenGrid] = (),
    radius: int | tuple[int, int] | None = None,
    exact_queries: Literal["exact", "local"] = "exact",
    terms: int = 3,
    weight: float = 1.0,
    combine: Combine = "shared",
    centre: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend exactly to near keys and to all others through a Taylor series in few dimensions.

    ``combine="shared"`` puts both under one denominator:
    ``num_i = weight sum_all far_ij v_j + sum_near (exp(s_ij) - weight far_ij) v_j``, where ``far_ij`` estimates
    ``exp(s_ij)``: what the means of queries and keys say of a logit is exact, the rest is projected and goes through
    ``T_P(s) = sum_{p<P} s^p / p!``. A window over all keys makes it exact attention. ``combine="additive"`` is
    ``local + weight * global`` of two attentions with a denominator each, as hybrids were first published; it counts
    near keys twice and does not approach exact attention.

    Near are, in one dimension, the keys of ``window_attention`` (give ``window``), in two those of
    ``window_attention_2d`` (give ``grids`` and ``radius``). Take an odd number of terms: an even one can make a
    denominator negative, and that query NaN. Kin of a near and a far field (Nguyen et al. 2021, "FMMformer").

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        projection: Bases fitted to this layer by ``fit_projection``; or give ``low``.
        low: Low vectors of queries ``[B, H, Nq, r]`` and keys ``[B, H, Nk, r]`` that were made otherwise.
        low_scale: Scale of their scores; that of the scores if ``None``.
        window: Radius of the one-dimensional window in tokens.
        prefix: Leading keys that every query sees (one dimension).
        chunk: Queries that share one window (one dimension).
        grids: Grids of image tokens (two dimensions).
        radius: Reach along rows and columns in tokens (two dimensions).
        exact_queries: What queries outside every grid see exactly (two dimensions): ``"exact"`` every key,
            ``"local"`` the tokens outside the grids.
        terms: P, 1 to 8.
        weight: Factor of the far part, at least 0; 0 = near keys only.
        combine: ``"shared"`` or ``"additive"``.
        centre: Take the means out of the logits; without it the series gets all of the projected logits.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. Masked tokens may hold anything.
        impl: ``"fused"`` (Triton; heads up to 128 wide and up to 32 low coordinates), ``"blocked"`` (time linear in
            the tokens, no gradient), ``"reference"`` (differentiable, quadratic), or ``"auto"``: the first of these
            that can run here.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 (or float64) ``lse``. Zeros and
        ``-inf`` for a row without keys. The additive form has no denominator; its ``lse`` is that of the near keys.

    Raises:
        ValueError: Shapes, dtypes, devices or settings do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    check_terms(terms)
    near = Near(q.shape[2], k.shape[2], window, prefix, chunk, tuple(grids), radius, exact_queries)
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"weight must be a finite number of at least 0, got {weight}")
    if combine not in get_args(Combine):
        raise ValueError(f"combine must be one of {get_args(Combine)}, got {combine!r}")
    rank = _check_low(q, k, projection, low)
    bases = low if projection is None else (projection.q_basis, projection.k_basis)
    assert bases is not None
    scale = resolve_scale(scale, q.shape[-1])
    low_scale = scale if low_scale is None else resolve_scale(low_scale, rank)
    chosen = _choose(impl, (q, k, v), bases, terms, key_mask)
    settings = FarSettings(scale, low_scale, terms, weight, centre)
    if chosen is Impl.FUSED and combine == "shared":
        from attn_kernels.hybrid.fused import hybrid_fused

        return hybrid_fused(q, k, v, projection or bases, near, settings, key_mask)
    q_low, k_low = _low_vectors(q, k, projection, low)
    if combine == "additive":
        # The parts may have forms of their own where none is asked for.
        form = impl if impl == Impl.AUTO else chosen
        return _add(q, k, v, (q_low, k_low), near, settings, key_mask, chosen, form)
    far = far_field(q, k, (q_low, k_low), settings, key_mask)
    if chosen is Impl.REFERENCE:
        return hybrid_reference(q, k, v, far, near.seen, scale=scale)
    return hybrid_blocked(q, k, v, far, near.blocks(q.device), scale=scale)


def _add(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: tuple[Tensor, Tensor],
    near: Near,
    settings: FarSettings,
    key_mask: Tensor | None,
    chosen: Impl,
    form: Impl | str,
) -> Partial:
    """Add two attentions with a denominator each: the near keys, and the series over all."""
    local = near.attend(q, k, v, scale=settings.scale, key_mask=key_mask, impl=form)
    config = TaylorConfig(centre=settings.centred)
    if chosen is Impl.FUSED:
        from attn_kernels.taylor.fused import taylor_fused

        beyond = taylor_fused(*low, v, terms=settings.terms, scale=settings.low_scale, key_mask=key_mask, config=config)
        return Partial(torch.add(local.out, beyond.out, alpha=settings.weight), local.lse)
    wide = low[0].dtype
    beyond = taylor_attention(
        *low, v.to(wide), terms=settings.terms, scale=settings.low_scale, key_mask=key_mask, config=config, impl=form
    )
    return Partial((local.out.to(wide) + settings.weight * beyond.out).to(v.dtype), local.lse)


def _choose(
    impl: Impl | str,
    tensors: tuple[Tensor, Tensor, Tensor],
    low: tuple[Tensor, Tensor],
    terms: int,
    key_mask: Tensor | None,
) -> Impl:
    """Pick the implementation for q, k and v and low vectors or bases, or raise with the reason why it cannot run."""
    gradient = None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *low)):
        gradient = "it has no gradient and an input requires one; use the reference, or torch.no_grad()"
    fused = gradient or refuse_fused(impl, *tensors, *(() if key_mask is None else (key_mask,)))
    if fused is None:
        from attn_kernels.hybrid.fused import refuse_hybrid_fused

        fused = refuse_hybrid_fused(*tensors, rank=low[0].shape[-1], terms=terms)
    return resolve_impl(impl, {Impl.FUSED: fused, Impl.BLOCKED: gradient, Impl.REFERENCE: None})


def _check_low(q: Tensor, k: Tensor, projection: Projection | None, low: tuple[Tensor, Tensor] | None) -> int:
    """Check bases, or the low vectors that were given; return how many coordinates they have."""
    if (projection is None) == (low is None):
        raise ValueError("give a projection (fit_projection) or low vectors, and not both")
    if projection is not None:
        projection.check(q)
        return projection.rank
    assert low is not None
    for name, vectors, tokens in (("q_low", low[0], q), ("k_low", low[1], k)):
        expected = (*tokens.shape[:3], low[0].shape[-1])
        if tuple(vectors.shape) != expected or vectors.device != tokens.device:
            raise ValueError(
                f"{name} must be [B, H, N, r] = {expected} on {tokens.device}, "
                f"got {tuple(vectors.shape)} on {vectors.device}"
            )
    return low[0].shape[-1]


def _low_vectors(
    q: Tensor, k: Tensor, projection: Projection | None, low: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return projected queries and keys, in float32 or wider."""
    if projection is not None:
        return projection.apply(q, k)
    assert low is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    return low[0].to(wide), low[1].to(wide)
