"""Taylor attention in Triton: the launches of the kernels in ``fused_kernels``, on what ``fused_tokens`` prepares.

Means and key weights; tokens turned and centred; sums of the features over the keys, per split of the keys and then
in order; what the queries read from them with the division in the same kernel. Tokens are multiplied by the root of
the scale and key weights divided by their mean, so that features, weighted values and mean sums are of order one in
any dtype. Heads cut into blocks are read in place by their strides.

The features are held whole (``"full"``) or a chunk at a time (``"streaming"``): then the numerators and denominators
of the queries wait in float32, and everything that grows with R is bounded by the chunk.

Least-squares coefficients differ from query to query: the variance of a query's logits is twice what the features of
degree 2 alone say of the denominator, and each feature of a query is multiplied by the factor of its degree.
"""

from dataclasses import replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from attn_kernels.partial import Partial
from attn_kernels.targets import device_target
from attn_kernels.taylor.coefficients import hermite_factors
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.features import taylor_feature_count
from attn_kernels.taylor.fused_config import (
    RESIDENT_QUERIES,
    RESIDENT_ROUNDS,
    TaylorLaunch,
    resident_warps,
    taylor_launch,
)
from attn_kernels.taylor.fused_kernels import (
    taylor_query_kernel,
    taylor_reduce_kernel,
    taylor_state_kernel,
    taylor_unrank_kernel,
)
from attn_kernels.taylor.fused_resident import WIDTH, arrange, taylor_resident_kernel
from attn_kernels.taylor.fused_tokens import DTYPES, Tokens, padded_width, prepare_tokens, spans
from attn_kernels.taylor.readout import blocks_lse
from attn_kernels.triton_support import interpreted, triton_version

_STATE_BYTES = 1 << 28
"""Bytes of summed features up to which the full path is chosen, and which a chunk of the streaming path has."""
_TABLE_FEATURES = 1 << 17
"""Features up to which a table of indices is kept between calls."""


def refuse_taylor_fused(q: Tensor, k: Tensor, v: Tensor, *, terms: int, config: TaylorConfig) -> str | None:
    """Say why the kernels cannot compute this call, or ``None``; ``refuse_fused`` has been asked before.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        terms: P.
        config: How the series is expanded.
    """
    if q.dtype is torch.float64:
        return "the kernels compute in float32 and the input is float64; use the blocked form"
    longest, width = max(q.shape[2], k.shape[2]), q.shape[-1] // config.blocks
    return refuse_sizes(longest, width, v.shape[-1], terms=terms, config=config)


def refuse_sizes(tokens: int, width: int, columns: int, *, terms: int, config: TaylorConfig) -> str | None:
    """Say why the kernels cannot hold a head, or ``None``.

    Args:
        tokens: The larger of Nq and Nk.
        width: D of a block.
        columns: Dv of all blocks.
        terms: P.
        config: How the series is expanded.
    """
    longest = tokens + 16
    room = max(_STATE_BYTES, (config.feature_chunk or 0) * columns)
    if config.path == "full":
        room = max(room, taylor_feature_count(width, terms) * columns)
    if max((width + 1) * longest, room) >= 1 << 31:
        return f"a head of {longest} tokens, or its sums, has more elements than 32 bits count; use the blocked form"
    if width > 256:
        return f"heads wider than 256 do not fit its tiles, got {width}"
    return None


def taylor_fused(
    q: Tensor, k: Tensor, v: Tensor, *, terms: int, scale: float, key_mask: Tensor | None, config: TaylorConfig
) -> Partial:
    """Compute ``taylor_attention`` without gradient; arguments as there, checked, resolved and not refused.

    Products are those of the dtype of ``v``; queries and keys may be wider. ``config.store`` sets the dtype of the
    sums of float32 input; those of bfloat16 and float16 input are stored in its own dtype, in which they enter the
    product. ``config.key_chunk`` does not concern the kernels.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 ``lse``.
    """
    batch, heads, queries, _ = q.shape
    blocks = config.blocks
    out = v.new_empty(batch, heads, queries, v.shape[-1])
    lse = q.new_empty(batch, heads, blocks, queries, dtype=torch.float32)
    if q.numel() == 0:
        return Partial(out, lse[:, :, 0])
    v = v if v.stride(-1) == 1 else v.contiguous()
    tokens = prepare_tokens(q, k, key_mask, scale, v.dtype, centred=config.centre, blocks=blocks)
    tokens = _fit(tokens, terms, config)
    columns = v.shape[-1] // blocks
    step = columns if config.value_chunk is None or blocks > 1 else min(columns, config.value_chunk)
    for start in range(0, columns, step):
        some = slice(None) if step == columns else slice(start, min(start + step, columns))
        _sweep(tokens, v[..., some], terms, config, target=(out[..., some], lse))
    if blocks == 1:
        return Partial(out, lse[:, :, 0])
    return Partial(out, blocks_lse(list(lse.unbind(dim=2))))


def taylor_fused_denominators(
    q: Tensor,
    k: Tensor,
    *,
    terms: int,
    scale: float,
    key_mask: Tensor | None,
    config: TaylorConfig,
    queries: Tensor | None = None,
) -> Tensor:
    """Compute the denominators of queries as shares of the sum of the key weights, without any value.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        terms: P.
        scale: Score scale.
        key_mask: ``[B, Nk]`` bool, True = keep.
        config: How the series is expanded.
        queries: ``[n]`` int64, the queries to answer for; ``None`` = all. The mean query is that of all.

    Returns:
        ``[B, H, blocks, n]`` fp32; a query whose share is not above ``config.eps`` has no answer. 0 without keys.
    """
    tokens = prepare_tokens(
        q, k, key_mask, scale, q.dtype, centred=config.centre, blocks=config.blocks, some=queries
    )  # fmt: skip
    tokens = _fit(tokens, terms, config)
    answer = q.new_empty(*q.shape[:2], config.blocks, tokens.queries, dtype=torch.float32)
    _sweep(tokens, None, terms, config, sums=(answer, answer))
    return answer


def taylor_fused_sums(tokens: Tokens, v: Tensor, *, terms: int) -> tuple[Tensor, Tensor]:
    """Sum the series over all keys for each query without dividing, as means over the keys.

    Args:
        tokens: Turned tokens of heads in one block.
        v: ``[B, H, Nk, Dv]``.
        terms: P.

    Returns:
        Numerators ``[G, Nq, Dv]`` and denominators ``[G, Nq]``, fp32; times ``exp(offset)`` they are those of
        attention, divided by the number of keys.
    """
    v = v if v.stride(-1) == 1 else v.contiguous()
    num = v.new_empty(tokens.turned_q.shape[0], tokens.queries, v.shape[-1], dtype=torch.float32)
    den = v.new_empty(tokens.turned_q.shape[0], tokens.queries, dtype=torch.float32)
    _sweep(tokens, v, terms, TaylorConfig(), sums=(num, den))
    return num, den


def _fit(tokens: Tokens, terms: int, config: TaylorConfig) -> Tokens:
    """Find the least-squares coefficients of the queries where ``config`` asks for them."""
    if config.coefficients == "taylor" or tokens.queries == 0:
        return tokens
    half = tokens.weights.new_empty(tokens.turned_q.shape[0], tokens.queries)
    _sweep(tokens, None, 3, TaylorConfig(path="full"), sums=(half, half), squares=True)
    factors, log_gain = hermite_factors(2 * half, terms, config.hermite_limit)
    gain = torch.nn.functional.pad(log_gain, (0, tokens.offset.shape[-1] - tokens.queries))
    return replace(tokens, factors=factors.contiguous(), offset=tokens.offset + gain)


def _sweep(
    tokens: Tokens,
    v: Tensor | None,
    terms: int,
    config: TaylorConfig,
    *,
    target: tuple[Tensor, Tensor] | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
    squares: bool = False,
) -> None:
    """Sum the features over the keys and read them, a chunk of them at a time.

    Args:
        tokens: Turned tokens.
        v: ``[B, H, Nk, blocks * Dv]``; ``None`` = denominators only.
        terms: P.
        config: How much at a time.
        target: ``[B, H, Nq, blocks * Dv]`` and lse ``[B, H, blocks, Nq]`` fp32, where the divided answers go.
        sums: Numerators ``[G, Nq, Dv]`` and denominators ``[G, Nq]`` fp32, where what is not divided goes; without
            values only the denominators are written.
        squares: Leave out all features but those of degree 2.
    """
    groups, width = tokens.turned_k.shape[0], tokens.width
    columns = 1 if v is None else v.shape[-1] // tokens.blocks
    launch, constants = _constants(tokens, columns, terms, products=v is not None)
    features = taylor_feature_count(width, terms)
    chunk = _chunk(features, groups * columns, tokens.keys, config)
    # What is not read or written; the kernels want something to point at.
    nothing = tokens.weights
    out, lse = (nothing, nothing) if target is None else target
    num, den = (nothing, nothing) if sums is None else sums
    if sums is None and chunk < features:
        num, den = nothing.new_empty(groups, tokens.queries, columns), nothing.new_empty(groups, tokens.queries)
    strides = (0, 0, 0) if target is None else out.stride()[:3]
    tiles, fitted = triton.cdiv(columns, int(str(constants["BE"]))), tokens.factors is not None
    for first in range(0, features, chunk):
        count = min(chunk, features - first)
        table, weight = _table(width, terms, first, count, nothing.device)
        weight = weight * (table[1] > 0) if squares else weight
        state, normaliser = _sum_keys(tokens, nothing if v is None else v, table, weight, launch, constants, config)
        if target is not None and _fits_resident(tokens, columns, terms, count):
            _read_resident(tokens, state, normaliser, out, lse, config)
            return
        taylor_query_kernel[(triton.cdiv(tokens.queries, launch.queries), groups, tiles)](
            tokens.turned_q, table, state, normaliser, nothing if tokens.factors is None else tokens.factors,
            tokens.offset, tokens.total, num, den, out, lse, *strides, 1 if v is None else v.shape[1], tokens.blocks,
            tokens.queries, tokens.turned_q.shape[-1], count, int(first > 0), config.eps, BQ=launch.queries,
            FITTED=fitted, FINISH=target is not None and first + count == features,
            **{**constants, "BF": launch.query_features(fitted=fitted)},
        )  # fmt: skip


def _constants(tokens: Tokens, columns: int, terms: int, *, products: bool) -> tuple[TaylorLaunch, dict[str, object]]:
    """Return the stored configuration for these tokens and ``columns``, and what both kernels are specialised for."""
    dtype = tokens.turned_k.dtype
    padded = padded_width(columns)
    # The interpreter takes as long for a small tile as for a large one.
    kind = torch.bfloat16 if interpreted() else dtype
    launch = taylor_launch(device_target(tokens.turned_k.device), kind, padded, terms)
    # Without products there is little to hide the loads behind.
    stages = launch.stages if products else 1
    return launch, {
        "D": tokens.width, "DV": columns, "DEGREE": terms - 1, "BF": launch.features,
        "BE": min(padded, launch.columns), "HAS_V": products, "DTYPE": DTYPES[dtype], "INTERPRET": interpreted(),
        "STAGES": stages, "num_warps": launch.warps, "num_stages": stages,
    }  # fmt: skip


def _sum_keys(
    tokens: Tokens,
    v: Tensor,
    table: Tensor,
    weight: Tensor,
    launch: TaylorLaunch,
    constants: dict[str, object],
    config: TaylorConfig,
) -> tuple[Tensor, Tensor]:
    """Sum the features of a table over the keys: ``[G, F, Dv]`` in the dtype of the product, ``[G, F]`` fp32."""
    groups, count = tokens.turned_k.shape[0], weight.shape[0]
    columns, tile = int(str(constants["DV"])), int(str(constants["BE"]))
    tiles = triton.cdiv(count, launch.features) * triton.cdiv(columns, tile)
    span, splits = spans(tokens.keys, groups, tiles, launch.tokens)
    held = columns if constants["HAS_V"] else 0
    parts = tokens.weights.new_empty(splits, groups, count, held)
    denominators = tokens.weights.new_empty(splits, groups, count)
    mask = tokens.mask
    taylor_state_kernel[(tiles, groups, splits)](
        tokens.turned_k, tokens.weights, v, tokens.weights if mask is None else mask, table, parts, denominators,
        *(v.stride()[:3] if held else (0, 0, 0)), 0 if mask is None else mask.stride(0),
        1 if not held else v.shape[1], tokens.blocks, tokens.keys, tokens.turned_k.shape[-1], count, span,
        BN=launch.tokens, HAS_MASK=mask is not None, **constants,
    )  # fmt: skip
    dtype = tokens.turned_k.dtype
    if dtype is torch.float32 and config.store == "bfloat16":
        dtype = torch.bfloat16
    state = torch.empty(groups, count, held, dtype=dtype, device=v.device)
    normaliser = tokens.weights.new_empty(groups, count)
    taylor_reduce_kernel[(tiles, groups)](
        parts, denominators, weight, state, normaliser, splits, groups, count, 1.0 / tokens.keys,
        DV=columns, BF=launch.features, BE=tile, HAS_V=constants["HAS_V"],
        DTYPE=DTYPES[dtype], INTERPRET=interpreted(), num_warps=4,
    )  # fmt: skip
    return state, normaliser


def _fits_resident(tokens: Tokens, columns: int, terms: int, count: int) -> bool:
    """Whether the kernel with resident sums computes this shape; it wants all sums at once, in half precision."""
    half = tokens.turned_q.dtype in (torch.bfloat16, torch.float16)
    whole = count == taylor_feature_count(WIDTH, 4)
    # It keeps its sums in tuples, which came with Triton 3.3.
    version = triton_version()
    known = not isinstance(version, str) and version >= (3, 3)
    used = known and resident_warps(device_target(tokens.turned_q.device)) is not None and tokens.factors is None
    return used and half and terms == 4 and tokens.width == WIDTH and columns <= WIDTH and whole


def _read_resident(
    tokens: Tokens, state: Tensor, normaliser: Tensor, out: Tensor, lse: Tensor, config: TaylorConfig
) -> None:
    """Write ``out`` and ``lse`` from all 969 sums, ``[G, 969, Dv]`` and ``[G, 969]``."""
    rounds = 1 if interpreted() else RESIDENT_ROUNDS
    programs = triton.cdiv(tokens.queries, rounds * RESIDENT_QUERIES)
    taylor_resident_kernel[(programs, state.shape[0])](
        tokens.turned_q, *arrange(state, normaliser), tokens.offset, tokens.total, out, lse, *out.stride()[:3],
        lse.shape[1], tokens.blocks, tokens.queries, tokens.turned_q.shape[-1], rounds, config.eps,
        DV=state.shape[-1], BQ=RESIDENT_QUERIES, DTYPE=DTYPES[state.dtype], INTERPRET=interpreted(),
        num_warps=resident_warps(device_target(out.device)) or 4, num_stages=1,
    )  # fmt: skip


def _chunk(features: int, columns: int, keys: int, config: TaylorConfig) -> int:
    """Features held at a time, for ``columns`` value columns of all groups together."""
    room = max(64, _STATE_BYTES // (4 * columns))
    if config.path == "full" or (config.path == "auto" and config.feature_chunk is None and features <= room):
        return features
    if config.feature_chunk is not None:
        return min(features, config.feature_chunk)
    return min(features, room // 64 * 64)


def _table(width: int, terms: int, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices ``[P - 1, count]`` int32 and weights ``[count]`` of the features from ``first`` on."""
    return (_kept_table if count <= _TABLE_FEATURES and first == 0 else _new_table)(width, terms, first, count, device)


def _new_table(width: int, terms: int, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the table of ``_table``."""
    table = torch.empty(max(1, terms - 1), count, dtype=torch.int32, device=device)
    weight = torch.empty(count, dtype=torch.float32, device=device)
    taylor_unrank_kernel[(triton.cdiv(count, 128),)](
        table, weight, first, count, width + 1, DEGREE=terms - 1, BF=128, num_warps=4
    )
    return table, weight


_kept_table = lru_cache(maxsize=32)(_new_table)
