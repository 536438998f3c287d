"""Taylor attention in Triton: the launches of the kernels in ``fused_centring`` and ``fused_kernels``.

Means and key weights; tokens turned and centred; sums of the features over the keys, per split of the keys and then
in order; what the queries read from them with the division in the same kernel. Tokens are multiplied by the root of
the scale and key weights divided by their mean, so that features, weighted values and mean sums are of order one in
any dtype. Heads cut into blocks are read in place by their strides.

The features are held whole (``"full"``) or a chunk at a time (``"streaming"``): then the numerators and denominators
of the queries wait in float32, and everything that grows with R is bounded by the chunk.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.partial import Partial
from attn_kernels.targets import device_target
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.features import taylor_feature_count
from attn_kernels.taylor.fused_centring import taylor_key_mean_kernel, taylor_sum_kernel, taylor_turn_kernel
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
from attn_kernels.taylor.readout import blocks_lse
from attn_kernels.triton_support import interpreted, triton_version

_DTYPES = MappingProxyType({torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16})
_STATE_BYTES = 1 << 28
"""Bytes of summed features up to which the full path is chosen, and which a chunk of the streaming path has."""
_TABLE_FEATURES = 1 << 17
"""Features up to which a table of indices is kept between calls."""
_PROGRAMS = 1024
"""Programs of the state kernel to aim at: a few for each multiprocessor of a large device."""
_TOKENS = 64
"""Tokens handled at a time by the kernels before the features."""


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
    if config.coefficients != "taylor":
        return "coefficients='hermite' differ per query, which the kernels do not compute; use the blocked form"
    width = q.shape[-1] // config.blocks
    longest = max(q.shape[2], k.shape[2]) + 16
    room = max(_STATE_BYTES, (config.feature_chunk or 0) * v.shape[-1])
    if config.path == "full":
        room = max(room, taylor_feature_count(width, terms) * v.shape[-1])
    if max((width + 1) * longest, room) >= 1 << 31:
        return f"a head of {longest} tokens, or its sums, has more elements than 32 bits count; use the blocked form"
    if width > 256:
        return f"heads wider than 256 do not fit its tiles, got {width}"
    return None


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Everything that the kernels of the features read; G = B * H * blocks groups of columns.

    Attributes:
        turned_q: ``[G, D + 1, pitch]``, centred queries behind a row of ones.
        turned_k: ``[G, D + 1, pitch]``, centred keys.
        offset: ``[G, pitch]`` fp32, what the normaliser of each query gets added.
        weights: ``[G, pitch]`` fp32, of the keys, divided by their mean over all keys.
        total: ``[G]`` fp32, their sum before; 0 = every key is masked.
        mask: ``[B, Nk]`` uint8, or ``None``.
        blocks: Blocks of a head.
        queries: Nq of ``turned_q``.
        keys: Nk.
    """

    turned_q: Tensor
    turned_k: Tensor
    offset: Tensor
    weights: Tensor
    total: Tensor
    mask: Tensor | None
    blocks: int
    queries: int
    keys: int

    @property
    def width(self) -> int:
        """D of a block."""
        return self.turned_k.shape[1] - 1


def taylor_fused(
    q: Tensor, k: Tensor, v: Tensor, *, terms: int, scale: float, key_mask: Tensor | None, config: TaylorConfig
) -> Partial:
    """Compute ``taylor_attention`` without gradient; arguments as there, checked, resolved and not refused.

    ``config.store`` sets the dtype of the sums of float32 input; those of bfloat16 and float16 input are stored in its
    own dtype, in which they enter the product. ``config.key_chunk`` does not concern the kernels.

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
    tokens = _prepare(q, k, key_mask, scale, config)
    columns = v.shape[-1] // blocks
    step = columns if config.value_chunk is None or blocks > 1 else min(columns, config.value_chunk)
    for start in range(0, columns, step):
        some = slice(None) if step == columns else slice(start, min(start + step, columns))
        _attend(tokens, v[..., some], out[..., some], lse, terms, config)
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
    tokens = _prepare(q, k, key_mask, scale, config, queries)
    answer = q.new_empty(*q.shape[:2], config.blocks, tokens.queries, dtype=torch.float32)
    _attend(tokens, None, None, answer, terms, config)
    return answer


def _prepare(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, config: TaylorConfig, some: Tensor | None = None
) -> _Tokens:
    """Find means and weights, and turn the tokens; of the queries only ``some`` ``[n]``, if given."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    batch, heads, queries, width = q.shape
    groups, keys, width = batch * heads * config.blocks, k.shape[2], width // config.blocks
    padded = max(16, triton.next_power_of_2(width))
    sizes = {"D": width, "BD": padded, "BN": _TOKENS}

    query_mean = q.new_zeros(groups, padded, dtype=torch.float32)
    if config.centre:
        span, splits = _spans(queries, groups)
        sums = query_mean.new_empty(splits, groups, padded)
        taylor_sum_kernel[(splits, groups)](
            q, sums, *q.stride()[:3], heads, config.blocks, queries, span, num_warps=4, **sizes
        )
        query_mean = sums.sum(dim=0) / max(queries, 1)
    span, splits = _spans(keys, groups)
    peaks, totals = query_mean.new_empty(2, splits, groups).unbind()
    sums = query_mean.new_empty(splits, groups, padded)
    taylor_key_mean_kernel[(splits, groups)](
        k, q if mask is None else mask, query_mean, peaks, totals, sums, *k.stride()[:3],
        0 if mask is None else mask.stride(0), heads, config.blocks, keys, span, scale,
        HAS_MASK=mask is not None, num_warps=4, **sizes,
    )  # fmt: skip
    shift = peaks.amax(dim=0)
    fade = torch.exp(peaks - torch.where(shift == -torch.inf, 0, shift))
    total = (totals * fade).sum(dim=0)
    divisor = torch.where(total == 0, 1, total)
    key_mean = (sums * fade.unsqueeze(-1)).sum(dim=0) / divisor.unsqueeze(-1)
    key_mean = key_mean if config.centre else torch.zeros_like(key_mean)
    # A peak of -inf is that of no key at all, whose weights are 0 whatever they are divided by.
    shift = torch.where(shift == -torch.inf, 0, shift) + torch.log(divisor)

    root = math.sqrt(abs(scale))
    chosen = q if some is None else q.index_select(2, some)
    turned = []
    for are_keys, x, mean, direction, share, factor in (
        (False, chosen, query_mean, key_mean, shift, math.copysign(root, scale)),
        (True, k, key_mean, query_mean, shift - math.log(keys), root),
    ):
        keep = mask if are_keys else None
        count = x.shape[2]
        # Rows begin at multiples of 16 bytes, so that they come in wide loads.
        pitch = -(-count // 16) * 16
        rows = q.new_empty(groups, width + 1, pitch)
        dots = q.new_empty(groups, pitch, dtype=torch.float32)
        taylor_turn_kernel[(triton.cdiv(pitch, _TOKENS), groups)](
            x, x if keep is None else keep, mean, direction, share, rows, dots, *x.stride()[:3],
            0 if keep is None else keep.stride(0), heads, config.blocks, count, pitch, factor, scale,
            KEYS=are_keys, HAS_MASK=keep is not None, DTYPE=_DTYPES[q.dtype], INTERPRET=interpreted(), num_warps=4,
            **sizes,
        )  # fmt: skip
        turned.append((rows, dots))
    (turned_q, offset), (turned_k, weights) = turned
    return _Tokens(turned_q, turned_k, offset, weights, total, mask, config.blocks, chosen.shape[2], keys)


def _spans(tokens: int, groups: int, tiles: int = 1, step: int = _TOKENS) -> tuple[int, int]:
    """Cut tokens into equal spans, multiples of ``step``, for about ``_PROGRAMS`` programs: ``(span, splits)``."""
    splits = max(1, min(_PROGRAMS // max(1, groups * tiles), tokens // (4 * step)))
    span = -(-tokens // (splits * step)) * step
    return span, -(-tokens // span)


def _attend(
    tokens: _Tokens, v: Tensor | None, out: Tensor | None, lse: Tensor, terms: int, config: TaylorConfig
) -> None:
    """Sum the features over the keys and read them; without ``v`` write denominators to ``lse``.

    Args:
        tokens: What ``_prepare`` made.
        v: ``[B, H, Nk, blocks * Dv]``, or ``None``.
        out: ``[B, H, Nq, blocks * Dv]``, written.
        lse: ``[B, H, blocks, Nq]`` fp32, written.
        terms: P.
        config: How the series is expanded.
    """
    groups, width = tokens.turned_k.shape[0], tokens.width
    columns = 1 if v is None else v.shape[-1] // tokens.blocks
    dtype = tokens.turned_k.dtype
    padded = max(16, triton.next_power_of_2(columns))
    # The interpreter takes as long for a small tile as for a large one.
    kind = torch.bfloat16 if interpreted() else dtype
    launch = taylor_launch(device_target(tokens.turned_k.device), kind, padded, terms)
    tile = min(padded, launch.columns)
    features = taylor_feature_count(width, terms)
    chunk = _chunk(features, groups * columns, tokens.keys, config)
    # Without products there is little to hide the loads behind.
    stages = 1 if v is None else launch.stages
    num = den = lse
    if chunk < features:
        den = lse if v is None else torch.empty_like(lse)
        num = den if v is None else lse.new_empty(groups, tokens.queries, columns)
    constants = {
        "D": width, "DV": columns, "DEGREE": terms - 1, "BF": launch.features, "BE": tile, "HAS_V": v is not None,
        "DTYPE": _DTYPES[dtype], "INTERPRET": interpreted(), "STAGES": stages,
        "num_warps": launch.warps, "num_stages": stages,
    }  # fmt: skip
    # Without values these are not read; the kernels want something to point at.
    source, target = (tokens.weights, tokens.weights) if v is None or out is None else (v, out)
    strides = (0, 0, 0) if out is None else out.stride()[:3]
    heads = lse.shape[1]
    for first in range(0, features, chunk):
        count = min(chunk, features - first)
        table, weight = _table(width, terms, first, count, lse.device)
        state, normaliser = _sum_keys(tokens, source, table, weight, launch, constants, config)
        if v is not None and out is not None and _fits_resident(tokens, columns, terms, count):
            _read_resident(tokens, state, normaliser, out, lse, config)
            return
        taylor_query_kernel[(triton.cdiv(tokens.queries, launch.queries), groups, triton.cdiv(columns, tile))](
            tokens.turned_q, table, state, normaliser, tokens.offset, tokens.total, num, den, target, lse, *strides,
            heads, tokens.blocks, tokens.queries, tokens.turned_q.shape[-1], count, int(first > 0), config.eps,
            BQ=launch.queries, FINISH=first + count == features, **constants,
        )  # fmt: skip


def _sum_keys(
    tokens: _Tokens,
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
    span, splits = _spans(tokens.keys, groups, tiles, launch.tokens)
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
        DTYPE=_DTYPES[dtype], INTERPRET=interpreted(), num_warps=4,
    )  # fmt: skip
    return state, normaliser


def _fits_resident(tokens: _Tokens, columns: int, terms: int, count: int) -> bool:
    """Whether the kernel with resident sums computes this shape; it wants all sums at once, in half precision."""
    half = tokens.turned_q.dtype in (torch.bfloat16, torch.float16)
    whole = count == taylor_feature_count(WIDTH, 4)
    # It keeps its sums in tuples, which came with Triton 3.3.
    version = triton_version()
    known = not isinstance(version, str) and version >= (3, 3)
    used = known and resident_warps(device_target(tokens.turned_q.device)) is not None
    return used and half and terms == 4 and tokens.width == WIDTH and columns <= WIDTH and whole


def _read_resident(
    tokens: _Tokens, state: Tensor, normaliser: Tensor, out: Tensor, lse: Tensor, config: TaylorConfig
) -> None:
    """Write ``out`` and ``lse`` from all 969 sums, ``[G, 969, Dv]`` and ``[G, 969]``."""
    rounds = 1 if interpreted() else RESIDENT_ROUNDS
    programs = triton.cdiv(tokens.queries, rounds * RESIDENT_QUERIES)
    taylor_resident_kernel[(programs, state.shape[0])](
        tokens.turned_q, *arrange(state, normaliser), tokens.offset, tokens.total, out, lse, *out.stride()[:3],
        lse.shape[1], tokens.blocks, tokens.queries, tokens.turned_q.shape[-1], rounds, config.eps,
        DV=state.shape[-1], BQ=RESIDENT_QUERIES, DTYPE=_DTYPES[state.dtype], INTERPRET=interpreted(),
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
