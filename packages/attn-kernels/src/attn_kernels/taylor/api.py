"""Taylor attention: softmax attention with ``exp`` as its truncated series."""

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.partial import Partial
from attn_kernels.taylor.blocked import taylor_blocked
from attn_kernels.taylor.config import TaylorConfig, check_blocks, check_terms
from attn_kernels.taylor.reference import taylor_reference
from attn_kernels.triton_support import refuse_fused

_DEFAULT_CONFIG = TaylorConfig()


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    terms: int = 3,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    config: TaylorConfig = _DEFAULT_CONFIG,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend with ``exp(s)`` replaced by ``T_P(s) = sum_{p<P} s^p / p!``, in time linear in the tokens.

    T_P of a dot product is a dot product of symmetric monomials, ``R = C(D + P - 1, P - 1)`` of them, so the sums over
    the keys are made once and read by every query. By default only the residual logits around the mean query and the
    mean key are expanded, which changes nothing in exact arithmetic and is where the accuracy comes from.

    The error follows from the spread of the residual logits of a query: no polynomial of degree P - 1 fits ``exp``
    under a Gaussian of standard deviation s better than ``sqrt(Prob[Poisson(s^2) >= P])``; for s = 1 that is 28 % with
    3 terms and 6 % with 5, for s = 2 it is 46 % even with 6. Use it where logits are flat, or beside exact keys.

    Take an odd number of terms, 3 or 5: such a T_P is positive everywhere. An even one is negative for some logits;
    a query whose denominator is not positive then has no answer, see ``Returns`` and ``denominator_probe``.

    The expansion in linear time is that of Keles et al. 2023 ("On the computational complexity of self-attention");
    the bound above follows from the Hermite coefficients of ``exp``.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        terms: P, the number of terms, 1 to 8; the highest degree is P - 1.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``. Must be given if ``config.blocks > 1``.
        key_mask: ``[B, Nk]`` bool, True = keep. Masked tokens may hold anything.
        config: How the series is expanded and computed.
        impl: ``"fused"`` (Triton), ``"blocked"`` (fast torch, no gradient), ``"reference"`` (differentiable), or
            ``"auto"``: the first of these that can run; the reference where a gradient is wanted.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 (or float64) ``lse``, which
        estimates the logarithm of ``sum_j exp(scale * q_i . k_j)`` and merges with exact partials. NaN in both where
        the denominator is not above ``config.eps`` times the sum of the key weights; zeros and ``-inf`` where every
        key is masked. With ``config.blocks > 1`` the blocks have a normaliser each, and ``lse`` is NaN.

    Raises:
        ValueError: Shapes, dtypes, devices or terms do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    check_terms(terms)
    scale = check_blocks(q, scale, config)
    if v.shape[-1] % config.blocks:
        raise ValueError(f"v {tuple(v.shape)} cannot be cut into blocks={config.blocks} equal blocks of columns")
    chosen = _choose_impl(impl, q, k, v, terms, config)
    if chosen is Impl.FUSED:
        from attn_kernels.taylor.fused import taylor_fused

        return taylor_fused(q, k, v, terms=terms, scale=scale, key_mask=key_mask, config=config)
    if chosen is Impl.BLOCKED:
        return taylor_blocked(q, k, v, terms=terms, scale=scale, key_mask=key_mask, config=config)
    return taylor_reference(q, k, v, terms=terms, scale=scale, key_mask=key_mask, config=config)


def _choose_impl(impl: Impl | str, q: Tensor, k: Tensor, v: Tensor, terms: int, config: TaylorConfig) -> Impl:
    """Pick the implementation that runs on checked tensors."""
    gradient = None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        gradient = "it has no gradient and an input requires one; use the reference, or torch.no_grad()"
    fused = refuse_fused(impl, q, k, v) or gradient
    if fused is None:
        from attn_kernels.taylor.fused import refuse_taylor_fused

        fused = refuse_taylor_fused(q, k, v, terms=terms, config=config)
    return resolve_impl(impl, {Impl.FUSED: fused, Impl.BLOCKED: gradient, Impl.REFERENCE: None})
