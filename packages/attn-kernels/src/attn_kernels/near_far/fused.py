"""Near-far attention in Triton kernels: means of tiles, far tiles worth keeping, then block-sparse flash attention.

At most four launches, and nothing is copied into tile order: the programs compute the places of the tokens of a tile,
and write the answers where the queries lay.

1. ``near_far_pool_kernel``: float32 means of keys, values and, to choose tiles, queries; logarithms of the counts.
2. ``near_far_select_kernel``: the ``top_k`` far tiles of each head and tile, where they are not given.
3. ``near_far_plan_kernel``: the tiles chosen by the members of a group, each once, with a bit for each member.
4. ``near_far_fwd_kernel``: the attention. A program answers a group of neighbouring tiles so that the matrix
   instructions have enough rows; the group shares every load, and the bits of a key say which of its tiles see it.

What a group costs: with tiles of 8 two are answered together, so a query meets 12 tiles around it instead of 9, and the
chosen tiles of both. At 2048 x 2048 pixels (16,384 tokens and 512 of text, radius 1, top_k 2) that is
512 + 768 + 256 + 256 = 1,792 keys instead of 1,472: 1.22 times the products, and 0.6 times the bytes of keys and values
that a tile by itself would read from the L2 cache, which by estimate feeds a multiprocessor of an H100 about 24 bytes
a clock where 64 rows at full rate want 64. At 65,536 tokens the ratio is 1.14. With tiles of 4 and top_k 8 it is four
tiles: 512 + 256 + 1,024 + at most 512 keys instead of 1,800.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.fused_attend import near_far_fwd_kernel
from attn_kernels.near_far.fused_config import AttendConfig, attend_config
from attn_kernels.near_far.fused_pool import near_far_plan_kernel, near_far_pool_kernel, near_far_select_kernel
from attn_kernels.near_far.fused_tables import FusedTables, fused_tables, group_shape
from attn_kernels.near_far.tiles import NearFarConfig, NearFarCorrections, tile_counts, tile_total
from attn_kernels.partial import Partial
from attn_kernels.targets import device_target
from attn_kernels.triton_support import interpreted

_LOG2_E = 1.4426950408889634
_LEAST_SCALE = 1e-30
"""Masked scores are -inf before they are scaled, and -inf * 0 would be NaN."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One call: inputs, geometry and block sizes.

    Attributes:
        q: ``[B, H, N, D]``, with contiguous rows.
        k: ``[B, H, N, D]``, likewise.
        v: ``[B, H, N, Dv]``, likewise.
        keep: ``[B, N]`` uint8, the key mask; ``None`` without one.
        scale: Score scale.
        config: What stays exact.
        radius: Radius that no grid exceeds.
        top_k: Chosen tiles per tile.
        group: Rows and columns of tiles of a group.
        launch: Block sizes of the attention kernel.
        tables: Where tiles and groups lie.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    scale: float
    config: NearFarConfig
    radius: int
    top_k: int
    group: tuple[int, int]
    launch: AttendConfig
    tables: FusedTables

    @property
    def sequences(self) -> int:
        """Batch times heads."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def chosen_slots(self) -> int:
        """Places of a group's list of chosen tiles, a power of two; 0 where none are chosen."""
        return triton.next_power_of_2(self.group[0] * self.group[1] * self.top_k) if self.top_k else 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of batch, head and token of q, k and v."""
        return (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3])

    @property
    def mask(self) -> Tensor:
        """The key mask, or a tensor that is never read."""
        return self.tables.tiles if self.keep is None else self.keep

    @property
    def widths(self) -> dict[str, int]:
        """Widths of keys and values, and what they are padded to."""
        width, value_width = self.q.shape[-1], self.v.shape[-1]
        return {
            "HEAD_DIM": width,
            "VALUE_DIM": value_width,
            "BLOCK_D": padded_width(width),
            "BLOCK_V": padded_width(value_width),
        }


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Means of tiles; ``S = B * H``.

    Attributes:
        keys: ``[S, T, D]``, times the temperature.
        values: ``[S, T, Dv]``.
        bias: ``[S, T]`` float32, in units of ``q . k``; ``-inf`` for a tile without tokens.
        mean_q: ``[S, T, D]`` float32, only to choose tiles.
        mean_k: ``[S, T, D]`` float32, likewise.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    mean_q: Tensor
    mean_k: Tensor


def padded_width(width: int) -> int:
    """Return the power of two, at least 16, to which a head width is padded."""
    return max(16, int(triton.next_power_of_2(width)))


def near_far_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grids: tuple[TokenGrid, ...],
    config: NearFarConfig,
    scale: float,
    key_mask: Tensor | None,
    corrections: NearFarCorrections | None,
    selection: Tensor | None,
) -> Partial:
    """Compute near-far attention in Triton kernels, without gradient.

    Products take the operands' dtype (float32 stays float32) and sum in float32.

    Arguments as in ``near_far_attention``, checked; a near tile or a repeated one in ``selection`` counts once, and
    ``None`` chooses the tiles here.

    Returns:
        ``Partial`` with ``out`` ``[B, H, N, Dv]`` in the dtype of ``v``.
    """
    with torch.no_grad(), torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        tiles = tile_total(grids, config.tile_shape)
        top_k = min(config.top_k, tiles) if selection is None else config.top_k
        call = _prepare(q, k, v, grids, config, top_k, scale, key_mask)
        pooled = _pool(call, corrections, call.top_k > 0 and selection is None)
        chosen = counts = call.tables.tiles
        if call.top_k:
            chosen, counts = _plan(call, _select(call, pooled) if selection is None else selection.contiguous())
        return _attend(call, pooled, chosen, counts)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: tuple[TokenGrid, ...],
    config: NearFarConfig,
    top_k: int,
    scale: float,
    key_mask: Tensor | None,
) -> _Call:
    """Lay out one call."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    shape, counts = config.tile_shape, [tile_counts(grid, config.tile_shape) for grid in grids]
    width = max(padded_width(q.shape[-1]), padded_width(v.shape[-1]))
    launch = attend_config(device_target(q.device), q.dtype != torch.float32, width, shape[0] * shape[1])
    group = group_shape(shape, launch.queries, top_k)
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    return _Call(
        q=q,
        k=k,
        v=v,
        keep=None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        scale=scale,
        config=config,
        radius=min(config.radius, max(max(each) for each in counts) - 1),
        top_k=top_k,
        group=group,
        launch=launch,
        tables=fused_tables(grids, q.shape[2], shape, group, launch.keys, q.device, stream),
    )


def _magnitude(scale: float) -> float:
    """Return what turns products into scores of base 2, without its sign."""
    return max(abs(scale), _LEAST_SCALE) * _LOG2_E


def _pool(call: _Call, corrections: NearFarCorrections | None, select: bool) -> _Pooled:
    """Launch the kernel that averages tiles."""
    q, v, tiles = call.q, call.v, len(call.tables.tiles)
    keys = q.new_empty(call.sequences, tiles, q.shape[-1])
    values = v.new_empty(call.sequences, tiles, v.shape[-1])
    bias = q.new_empty(call.sequences, tiles, dtype=torch.float32)
    means = [torch.empty_like(keys, dtype=torch.float32) if select else bias for _ in range(2)]
    temperature, shift = (bias, bias) if corrections is None else (part.contiguous() for part in corrections)
    blocks = pool_blocks(call.config.tile_shape, max(call.widths["BLOCK_D"], call.widths["BLOCK_V"]))
    near_far_pool_kernel[(call.sequences * triton.cdiv(tiles, blocks["BLOCK_T"]),)](
        *(q, call.k, v, call.mask, call.tables.tiles, temperature, shift, *means, keys, values, bias),
        *call.strides,
        *(q.shape[1], q.shape[2], tiles, 1.0 / _magnitude(call.scale)),
        TILE_R=call.config.tile_shape[0],
        TILE_C=call.config.tile_shape[1],
        SELECT=select,
        CORRECTED=corrections is not None,
        MASKED=call.keep is not None,
        num_warps=4,
        **call.widths,
        **blocks,
    )
    return _Pooled(keys, values, bias, *means)


def pool_blocks(tile_shape: tuple[int, int], width: int) -> dict[str, int]:
    """Return the tiles and the tokens per tile that a pooling program holds at a time."""
    rows = max(16, 8192 // width)
    tokens = min(rows, triton.next_power_of_2(tile_shape[0] * tile_shape[1]))
    return {"BLOCK_T": rows // tokens, "BLOCK_S": tokens}


def select_blocks() -> dict[str, int]:
    """Return the query tiles, the key tiles and the columns of a block of the selection."""
    return {"BLOCK_Q": 64, "BLOCK_T": 32, "BLOCK_D": 32}


def select_precision(hip: bool) -> str:
    """Return how float32 means are multiplied: three products in TF32, which is as exact; AMD multiplies float32."""
    return "ieee" if hip else "tf32x3"


def _select(call: _Call, pooled: _Pooled) -> Tensor:
    """Launch the kernel that chooses far tiles; returns ``[S, T, top_k]`` int32."""
    tiles, blocks = len(call.tables.tiles), select_blocks()
    selection = torch.empty(call.sequences, tiles, call.top_k, dtype=torch.int32, device=call.q.device)
    near_far_select_kernel[(call.sequences * triton.cdiv(tiles, blocks["BLOCK_Q"]),)](
        *(pooled.mean_q, pooled.mean_k, pooled.bias, call.tables.tiles, selection, tiles, call.scale),
        TOP_K=call.top_k,
        SLOTS=triton.next_power_of_2(call.top_k),
        RADIUS=call.radius,
        HEAD_DIM=call.q.shape[-1],
        PRECISION=select_precision(torch.version.hip is not None),
        num_warps=8,
        **blocks,
    )
    return selection


def _plan(call: _Call, selection: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel that lists chosen tiles; returns ``[S, G, 5, slots]`` and their numbers ``[S, G]``, int32."""
    groups, slots = len(call.tables.groups), call.chosen_slots
    chosen = torch.empty(call.sequences, groups, 5, slots, dtype=torch.int32, device=selection.device)
    counts = torch.empty(call.sequences, groups, dtype=torch.int32, device=selection.device)
    near_far_plan_kernel[(call.sequences * groups,)](
        *(selection, call.tables.groups, call.tables.tiles, chosen, counts, len(call.tables.tiles), groups),
        TOP_K=call.top_k,
        GROUP_R=call.group[0],
        GROUP_C=call.group[1],
        RADIUS=call.radius,
        LIST=slots,
        num_warps=4 if slots > 16 else 1,
    )
    return chosen, counts


def _attend(call: _Call, pooled: _Pooled, chosen: Tensor, counts: Tensor) -> Partial:
    """Launch the attention kernel."""
    q, v, tables, launch = call.q, call.v, call.tables, call.launch
    (height, width), (rows, columns) = call.config.tile_shape, call.group
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=v.device)
    parts, outside = triton.cdiv(height * width * rows * columns, launch.queries), len(tables.outside)
    programs = triton.cdiv(outside, launch.queries) + len(tables.groups) * parts
    near_far_fwd_kernel[(call.sequences * programs,)](
        *(q, call.k, v, call.mask, pooled.keys, pooled.values, pooled.bias, tables.ranges, tables.outside),
        *(tables.groups, chosen, counts, out, lse),
        *call.strides,
        *(call.sequences, q.shape[1], q.shape[2], len(tables.tiles), len(tables.groups), outside),
        *(tables.all_ranges, len(tables.ranges), _magnitude(call.scale)),
        TILE_R=height,
        TILE_C=width,
        GROUP_R=rows,
        GROUP_C=columns,
        RADIUS=call.radius,
        LIST=call.chosen_slots,
        PARTS=parts,
        EXACT=call.config.exact_queries == "exact",
        NEGATIVE=call.scale < 0,
        MASKED=call.keep is not None,
        BLOCK_M=launch.queries,
        BLOCK_N=launch.keys,
        STAGES=launch.stages,
        INTERPRET=interpreted(),
        num_warps=launch.warps,
        num_stages=launch.stages,
        **call.widths,
    )
    return Partial(out, lse)
