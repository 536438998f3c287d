"""Near-far attention: exact where it is near or chosen, one pooled key per tile elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_kernels.checks import FLOAT_DTYPES, check_key_mask, check_qkv, resolve_scale
from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.near_far.blocked import near_far_blocked
from attn_kernels.near_far.reference import near_far_reference
from attn_kernels.near_far.selection import drop_repeats, select_tiles
from attn_kernels.near_far.tiles import NearFarConfig, NearFarCorrections, check_grids, near_tiles, tile_total
from attn_kernels.partial import Partial
from attn_kernels.triton_support import refuse_fused

_DEFAULT_CONFIG = NearFarConfig()
_FUSED_WIDTH = 256
"""Widest heads of the kernels."""
_FUSED_TOP_K = 128
"""Most chosen tiles of the kernels."""

_TRITON = (3, 3)
"""Triton 3.2's compiler aborts the process on the kernel over lists of key blocks."""


def near_far_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grids: Sequence[TokenGrid],
    config: NearFarConfig = _DEFAULT_CONFIG,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    corrections: NearFarCorrections | None = None,
    selection: Tensor | None = None,
    query_positions: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend to near and chosen tiles token by token and to every other tile by its mean key and value.

    Each grid is cut into tiles. A query in tile c attends, in one softmax, to every token outside the grids, to every
    token of the tiles of its grid within ``config.radius`` of c, to every token of the tiles chosen for c, and to each
    remaining tile as one key: the mean of its unmasked keys, with the logarithm of their number added to the score,
    and the mean of their values. A tile of equal keys and values is thus represented exactly. Exact attention where
    the radius covers the grid, the tile is one token, or every tile is chosen.

    Kin of the fast multipole method applied to attention (Nguyen et al. 2021, "FMMformer": a near field and a
    far field), here with one normaliser and pooled keys for the far field.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE; pooled as they are.
        v: ``[B, H, Nk, Dv]``.
        grids: Grids of image tokens among the keys. Tokens outside them are exact keys of every query.
        config: What stays exact.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. Masked tokens leave the means and the counts.
        corrections: Temperature and bias of pooled scores per head; ``None`` = (1, 0).
        selection: ``[B, H, T, top_k]`` int64, chosen tiles per head and query tile (tiles of all grids in order), -1 =
            none. A near tile or a repeated one counts once. ``None`` = chosen here by ``select_tiles``.
        query_positions: ``[Nq]`` int64, the positions of the rows of q among the keys, for training on sampled
            queries; ``None`` = all of them, ``Nq = Nk``.
        impl: ``"fused"`` (Triton kernels, on CUDA), ``"blocked"`` (torch, memory linear in N), ``"reference"``
            (differentiable, quadratic memory), or ``"auto"``: the first of these that can run; the reference where a
            gradient is wanted or ``query_positions`` is given.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 (or float64) ``lse``.

    Raises:
        ValueError: Shapes, dtypes, devices or grids do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    grids = check_grids(grids, k.shape[2])
    _check_positions(q, k, query_positions)
    _check_corrections(q, corrections)
    _check_selection(q, grids, config, selection)
    if config.top_k == 0:
        selection = None
    elif selection is None and query_positions is not None:
        raise ValueError(
            "query_positions needs a selection when top_k > 0, because tiles are chosen by the queries of all tokens; "
            "pass selection=select_tiles(all_q, k, ...)"
        )
    scale = resolve_scale(scale, q.shape[-1])
    tensors = (q, k, v, *(corrections or ()))
    torch_refusal = _refuse_inference(tensors, query_positions)
    fused_refusal = torch_refusal or refuse_fused(impl, *tensors, least=_TRITON) or _refuse_shapes(q, v, config)
    refusals = {Impl.FUSED: fused_refusal, Impl.BLOCKED: torch_refusal, Impl.REFERENCE: None}
    chosen = resolve_impl(impl, refusals)
    if chosen is Impl.FUSED:
        from attn_kernels.near_far.fused import near_far_fused

        return near_far_fused(
            q,
            k,
            v,
            grids=grids,
            config=config,
            scale=scale,
            key_mask=key_mask,
            corrections=corrections,
            selection=selection,
        )
    if selection is not None:
        selection = drop_repeats(selection, near_tiles(grids, config.tile_shape, config.radius, q.device))
    elif config.top_k > 0:
        selection = select_tiles(q, k, grids=grids, config=config, scale=scale, key_mask=key_mask)
    return _attend_in_torch(
        q, k, v, grids, config, scale, key_mask, corrections, selection, query_positions, blocked=chosen is Impl.BLOCKED
    )


def _attend_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: tuple[TokenGrid, ...],
    config: NearFarConfig,
    scale: float,
    key_mask: Tensor | None,
    corrections: NearFarCorrections | None,
    selection: Tensor | None,
    query_positions: Tensor | None,
    *,
    blocked: bool,
) -> Partial:
    """Run the blocked form or the reference; arguments as in ``near_far_attention``, checked and resolved."""
    if blocked:
        return near_far_blocked(
            q,
            k,
            v,
            grids=grids,
            config=config,
            scale=scale,
            key_mask=key_mask,
            corrections=corrections,
            selection=selection,
        )
    return near_far_reference(
        q,
        k,
        v,
        grids=grids,
        config=config,
        scale=scale,
        key_mask=key_mask,
        corrections=corrections,
        selection=selection,
        query_positions=query_positions,
    )


def _refuse_inference(tensors: Sequence[Tensor], query_positions: Tensor | None) -> str | None:
    """Say why the forms without a gradient cannot run, or ``None``."""
    if query_positions is not None:
        return "it needs the queries of all tokens, and query_positions names some"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient and an input requires one; use the reference, or torch.no_grad()"
    return None


def _refuse_shapes(q: Tensor, v: Tensor, config: NearFarConfig) -> str | None:
    """Say why the kernels cannot take inputs of this kind, or ``None``."""
    if q.dtype not in FLOAT_DTYPES:
        return f"the kernels compute in float32 at most, got {q.dtype}; use the blocked form"
    if max(q.shape[-1], v.shape[-1]) > _FUSED_WIDTH:
        return f"the kernels take head widths up to {_FUSED_WIDTH}, got {q.shape[-1]} and {v.shape[-1]}"
    if config.top_k > _FUSED_TOP_K:
        return f"the kernels take top_k up to {_FUSED_TOP_K}, got {config.top_k}"
    return None


def _check_positions(q: Tensor, k: Tensor, query_positions: Tensor | None) -> None:
    """Check that q holds all tokens, or that every row of q has a position."""
    if query_positions is None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"near-far attention needs a query per key, got q {tuple(q.shape)} and k {tuple(k.shape)}; "
                "name the rows of q with query_positions"
            )
    elif query_positions.dtype is not torch.int64 or tuple(query_positions.shape) != (q.shape[2],):
        raise ValueError(
            f"query_positions must be int64 [Nq] = ({q.shape[2]},), "
            f"got {query_positions.dtype} {tuple(query_positions.shape)}"
        )


def _check_corrections(q: Tensor, corrections: NearFarCorrections | None) -> None:
    """Check that the corrections hold one number per head."""
    for name, part in zip(("temperature", "bias"), corrections or (), strict=False):
        if tuple(part.shape) != (q.shape[1],):
            raise ValueError(f"corrections.{name} must be [H] = ({q.shape[1]},), got {tuple(part.shape)}")


def _check_selection(q: Tensor, grids: tuple[TokenGrid, ...], config: NearFarConfig, selection: Tensor | None) -> None:
    """Check the shape and dtype of chosen tiles."""
    if selection is None:
        return
    expected = (*q.shape[:2], tile_total(grids, config.tile_shape), config.top_k)
    if selection.dtype is not torch.int64 or tuple(selection.shape) != expected:
        raise ValueError(
            f"selection must be int64 [B, H, T, top_k] = {expected}, got {selection.dtype} {tuple(selection.shape)}"
        )
