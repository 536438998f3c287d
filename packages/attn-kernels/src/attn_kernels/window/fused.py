"""Window attention in Triton: the launches of the kernels in ``fused_kernels``."""

from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import exact_ranges
from attn_kernels.partial import Partial
from attn_kernels.targets import device_target
from attn_kernels.triton_support import interpreted
from attn_kernels.window.fused_config import WindowLaunch, window_launch
from attn_kernels.window.fused_kernels import window_2d_fwd_kernel, window_fwd_kernel

_LOG2_E = 1.4426950408889634
_DTYPES = MappingProxyType({torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16})


def window_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    prefix: int,
    chunk: int,
    scale: float,
    key_mask: Tensor | None,
) -> Partial:
    """Compute ``window_attention`` without gradient; arguments as there, checked and resolved.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 ``lse``.
    """
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (_rows(x) for x in (q, k, v))
    mask = None if key_mask is None else _rows(key_mask).view(torch.uint8)
    # No window is wider than the sequence, and sums of places must fit 32 bits.
    longest = max(q.shape[2], k.shape[2])
    _launch_1d(
        q, k, v, mask, out, lse, window=min(window, longest), prefix=min(prefix, k.shape[2]), chunk=min(chunk, longest),
        scale=scale,
    )  # fmt: skip
    return Partial(out, lse)


def window_fused_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grids: tuple[TokenGrid, ...],
    radius: tuple[int, int],
    exact_queries: str,
    scale: float,
    key_mask: Tensor | None,
) -> Partial:
    """Compute ``window_attention_2d`` without gradient; arguments as there, checked and resolved.

    Returns:
        ``Partial`` with ``out`` ``[B, H, N, Dv]`` in the dtype of ``v`` and float32 ``lse``.
    """
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (_rows(x) for x in (q, k, v))
    mask = None if key_mask is None else _rows(key_mask).view(torch.uint8)
    ranges = exact_ranges(grids, k.shape[2])
    k_out, v_out = (_pick(x, ranges, 2) for x in (k, v))
    mask_out = None if mask is None else _pick(mask, ranges, 1)
    for grid in grids:
        _launch_2d(q, k, v, mask, (k_out, v_out, mask_out), out, lse, grid=grid, radius=radius, scale=scale)
    seen = (k, v, mask) if exact_queries == "exact" else (k_out, v_out, mask_out)
    for start, stop in ranges:
        _launch_1d(
            q[:, :, start:stop], *seen, out[:, :, start:stop], lse[:, :, start:stop], window=0,
            prefix=seen[0].shape[2], chunk=1, scale=scale,
        )  # fmt: skip
    return Partial(out, lse)


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pick(x: Tensor, ranges: tuple[tuple[int, int], ...], axis: int) -> Tensor:
    """Return the tokens of the ranges: a view of a single range, else a copy."""
    parts = [x.narrow(axis, start, stop - start) for start, stop in ranges] or [x.narrow(axis, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _constants(q: Tensor, v: Tensor, mask: Tensor | None, launch: WindowLaunch) -> dict[str, object]:
    """Return what both kernels are specialised for."""
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "BD": _padded(q.shape[-1]),
        "BDV": _padded(v.shape[-1]),
        "BN": launch.keys,
        "HAS_MASK": mask is not None,
        "DTYPE": _DTYPES[q.dtype],
        "INTERPRET": interpreted(),
        "STAGES": launch.stages,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _padded(width: int) -> int:
    """Return the power of two, 16 at least, that holds a head's width."""
    return max(16, 1 << (width - 1).bit_length())


def _launch(q: Tensor, v: Tensor, mask: Tensor | None) -> WindowLaunch:
    """Return the stored configuration for these tensors."""
    return window_launch(device_target(q.device), q.dtype, _padded(max(q.shape[-1], v.shape[-1])), mask is not None)


def _launch_1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    window: int,
    prefix: int,
    chunk: int,
    scale: float,
) -> None:
    """Run ``window_fwd_kernel`` and write ``out`` and ``lse``."""
    batch, heads, queries, _ = q.shape
    if q.numel() == 0:
        return
    launch = _launch(q, v, mask)
    window_fwd_kernel[(triton.cdiv(queries, launch.queries), batch * heads)](
        q, k, v, q if mask is None else mask, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        0 if mask is None else mask.stride(0),
        heads, queries, k.shape[2], window, prefix, chunk, scale * _LOG2_E,
        BM=launch.queries, **_constants(q, v, mask, launch),
    )  # fmt: skip


def _launch_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    outside: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    *,
    grid: TokenGrid,
    radius: tuple[int, int],
    scale: float,
) -> None:
    """Run ``window_2d_fwd_kernel`` for the queries of one grid and write ``out`` and ``lse`` at their places."""
    batch, heads = q.shape[:2]
    if q.numel() == 0:
        return
    launch = _launch(q, v, mask)
    k_out, v_out, mask_out = outside
    tiles = triton.cdiv(grid.rows, launch.rows) * triton.cdiv(grid.columns, launch.columns)
    window_2d_fwd_kernel[(tiles, batch * heads)](
        q, k, v, q if mask is None else mask, k_out, v_out, q if mask_out is None else mask_out, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_out.stride()[:3], *v_out.stride()[:3],
        *out.stride()[:3], *lse.stride()[:2],
        0 if mask is None else mask.stride(0), 0 if mask_out is None else mask_out.stride(0),
        heads, k_out.shape[2], grid.start, grid.rows, grid.columns,
        min(radius[0], grid.rows), min(radius[1], grid.columns), scale * _LOG2_E,
        TR=launch.rows, TC=launch.columns, **_constants(q, v, mask, launch),
    )  # fmt: skip
