"""One attention call as ComfyUI makes it: bound by name, understood or refused with a reason, and made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_dispatch.call import AttentionCall
from attn_dispatch.masks import join_mask, mask_misfit

Attention = Callable[..., Any]
"""An attention function of ComfyUI: ``f(q, k, v, heads, mask=None, ...)``."""


GROUPED = "grouped heads"
"""Reason: keys and values have fewer heads than queries."""

MISFIT = "q, k and v do not fit each other"
"""Reason: sizes that no attention has."""


class HostArguments(NamedTuple):
    """What an attention function of ComfyUI is called with.

    Attributes:
        q: ``[B, Nq, H * D]``, or ``[B, H, Nq, D]`` with ``skip_reshape``.
        k: ``[B, Nk, H * D]``, or ``[B, H, Nk, D]`` with ``skip_reshape``.
        v: ``[B, Nk, H * Dv]``, or ``[B, H, Nk, Dv]`` with ``skip_reshape``.
        heads: Number of heads of ``q``.
        mask: ``[Nq, Nk]``, ``[B, Nq, Nk]`` or ``[B, H, Nq, Nk]``, each of them perhaps 1; bool or added to the scores.
        attn_precision: Dtype the host wants inside; for native attention only.
        skip_reshape: Which of the two layouts ``q``, ``k`` and ``v`` have.
        skip_output_reshape: Answer ``[B, H, Nq, Dv]`` instead of ``[B, Nq, H * Dv]``.
        rest: Keywords of a newer host, and ``transformer_options``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    attn_precision: torch.dtype | None
    skip_reshape: bool
    skip_output_reshape: bool
    rest: Mapping[str, Any]


def bind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **rest: Any,
) -> HostArguments:
    """Name the arguments of an attention call, all of them as in ``HostArguments``.

    Args:
        q: ``[B, Nq, H * D]``, or ``[B, H, Nq, D]`` with ``skip_reshape``.
        k: ``[B, Nk, H * D]`` or ``[B, H, Nk, D]``.
        v: ``[B, Nk, H * Dv]`` or ``[B, H, Nk, Dv]``.
        heads: Number of heads.
        mask: ``[Nq, Nk]``, ``[B, Nq, Nk]`` or ``[B, H, Nq, Nk]``.
        attn_precision: Dtype inside.
        skip_reshape: Layout of the inputs.
        skip_output_reshape: Layout of the output.
        **rest: What else the host passes.

    Raises:
        TypeError: They do not fit the signature.
    """
    return HostArguments(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, rest)


def refusal(bound: HostArguments) -> str | None:
    """Say why a call cannot be an ``AttentionCall``, or ``None``. Reads shapes and dtypes only.

    A host that forbids low precision for a call wants it exact.
    """
    q, k, v, heads = bound.q, bound.k, bound.v, bound.heads
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return "q, k and v are not tensors"
    if bound.rest.get("low_precision_attention") is False:
        return "the host asks for full precision"
    # Every access to a shape makes an object.
    asked, keys, values = q.shape, k.shape, v.shape
    axes = 4 if bound.skip_reshape else 3
    if len(asked) != axes or len(keys) != axes or len(values) != axes:
        return f"q, k and v are not {'[B, H, N, D]' if bound.skip_reshape else '[B, N, H * D]'}"
    if bound.skip_reshape:
        if asked[1] != heads or keys[1] != heads or values[1] != heads:
            return GROUPED
        fits = asked == keys == values or (
            asked[0] == keys[0] == values[0] and asked[3] == keys[3] and keys[2] == values[2]
        )
        return None if fits else MISFIT
    if asked[2] != keys[2]:
        return GROUPED if asked[2] % heads == 0 and bound.rest.get("enable_gqa") else MISFIT
    fits = asked[0] == keys[0] == values[0] and keys[1] == values[1]
    return None if fits and asked[2] % heads == 0 and values[2] % heads == 0 else MISFIT


def to_heads(x: Tensor, heads: int) -> Tensor:
    """View ``[B, N, H * D]`` as ``[B, H, N, D]``."""
    batch, tokens, channels = x.shape
    width = channels // heads
    if x.requires_grad:
        return x.view(batch, tokens, heads, width).transpose(1, 2)
    # One operator instead of two: a host that hands over flat tensors has three or four of them in every call.
    rows, columns, unit = x.stride()
    return x.as_strided((batch, heads, tokens, width), (rows, width * unit, columns, unit))


def from_heads(x: Tensor) -> Tensor:
    """Make ``[B, H, N, D]`` to ``[B, N, H * D]``."""
    return x.transpose(1, 2).flatten(2)


def score_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, str | None]:
    """Read a mask of ComfyUI, whose 3-D masks have a batch axis and no axis of heads.

    Args:
        mask: ``[Nq, Nk]``, ``[B, Nq, Nk]`` or ``[B, H, Nq, Nk]``, each of them perhaps 1.
        shape: ``(B, H, Nq, Nk)``.

    Returns:
        The mask broadcastable to ``[B, H, Nq, Nk]``, and why it is not understood, or ``None``.
    """
    if mask.ndim not in (2, 3, 4):
        return mask, f"the mask has {mask.ndim} axes"
    wide = mask[:, None] if mask.ndim == 3 else mask
    return wide, mask_misfit(wide, shape)


def same_scores(one: AttentionCall, other: AttentionCall) -> bool:
    """Whether two calls ask for the same attention of the same tensors."""
    return (
        one.q is other.q
        and one.k is other.k
        and one.v is other.v
        and one.scale == other.scale
        and one.key_mask is other.key_mask
        and one.attn_bias is other.attn_bias
    )


def make_again(function: Attention, bound: HostArguments, call: AttentionCall, asked: AttentionCall) -> Tensor:
    """Ask ``function`` for the attention of a call that was changed on the way.

    Unknown keywords stay. Another scale is put into the queries, since older hosts take none.

    Args:
        function: The host's attention.
        bound: The host's arguments, of which ``call`` was made.
        call: The call as it came.
        asked: The call wanted now.

    Returns:
        ``[B, H, Nq, Dv]``.
    """
    q = asked.q
    if asked.scale != call.scale:
        width = q.shape[-1] ** -0.5
        q = q * ((width if asked.scale is None else asked.scale) / (width if call.scale is None else call.scale))
    mask = join_mask(asked.key_mask, asked.attn_bias, q.dtype)
    host_is_bool = bound.mask is not None and bound.mask.dtype is torch.bool
    if mask is not None and mask.dtype is torch.bool and not host_is_bool:
        # Some backends add every mask to the scores, a bool one too.
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    rest = {**bound.rest, "skip_reshape": True, "skip_output_reshape": True}
    # Not every backend honours skip_output_reshape: the shape tells.
    output: Tensor = function(q, asked.k, asked.v, q.shape[1], mask=mask, attn_precision=bound.attn_precision, **rest)
    return output if output.ndim == 4 else to_heads(output, q.shape[1])
