"""Window attention in Triton: the launches of the kernels in ``fused_kernels``."""

from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Series:
    """What a series says of all keys, which the kernels replace where a query sees a key; G = B * H.

    Attributes:
        terms: P of the series.
        weight: Its factor.
        keys: Number of all keys, Nk.
        low_q: ``[G, r + 1, pitch]`` in the dtype of the product, coordinates of the queries behind a row of ones.
        low_k: ``[G, r + 1, pitch of the keys]``, of the keys.
        offset: ``[G, pitch]`` fp32, logarithm of the factor of each query.
        weights: ``[G, pitch of the keys]`` fp32, of the keys; 0 where masked.
        numerator: ``[G, Nq, Dv]`` fp32, mean over all keys of the series times value and weight.
        denominator: ``[G, Nq]`` fp32, the same without values.
    """

    terms: int
    weight: float
    keys: int
    low_q: Tensor
    low_k: Tensor
    offset: Tensor
    weights: Tensor
    numerator: Tensor
    denominator: Tensor

    def of_queries(self, start: int, stop: int) -> "Series":
        """The series of some queries, views."""
        some = slice(start, stop)
        return replace(
            self,
            low_q=self.low_q[..., start:],
            offset=self.offset[:, start:],
            numerator=self.numerator[:, some],
            denominator=self.denominator[:, some],
        )

    def of_keys(self, low_k: Tensor, weights: Tensor) -> "Series":
        """The same series, of other keys near by: ``low_k`` ``[G, r + 1, pitch]`` and ``weights`` ``[G, pitch]``."""
        return replace(self, low_k=low_k, weights=weights)


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
    series: Series | None = None,
) -> Partial:
    """Compute ``window_attention`` without gradient; arguments as there, checked and resolved.

    With a ``series`` the keys that a query does not see count as the series has it, under the same denominator.

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
        scale=scale, series=series,
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
    series: Series | None = None,
) -> Partial:
    """Compute ``window_attention_2d`` without gradient; arguments as there, checked and resolved.

    With a ``series`` the keys that a query does not see count as the series has it, under the same denominator.

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
    if series is not None:
        low_out, weights_out = _pick(series.low_k, ranges, 2), _pick(series.weights, ranges, 1)
        outside = series.of_keys(low_out, weights_out)
    else:
        outside = None
    for grid in grids:
        _launch_2d(
            q, k, v, mask, (k_out, v_out, mask_out), out, lse, grid=grid, radius=radius, scale=scale, series=series,
            outside=outside,
        )  # fmt: skip
    whole = exact_queries == "exact"
    seen = (k, v, mask) if whole else (k_out, v_out, mask_out)
    for start, stop in ranges:
        # Where every key is seen the series has nothing to say.
        said = None if whole or outside is None else outside.of_queries(start, stop)
        _launch_1d(
            q[:, :, start:stop], *seen, out[:, :, start:stop], lse[:, :, start:stop], window=0,
            prefix=seen[0].shape[2], chunk=1, scale=scale, series=said,
        )  # fmt: skip
    return Partial(out, lse)


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pick(x: Tensor, ranges: tuple[tuple[int, int], ...], axis: int) -> Tensor:
    """Return the tokens of the ranges: a view of a single range, else a copy."""
    parts = [x.narrow(axis, start, stop - start) for start, stop in ranges] or [x.narrow(axis, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _constants(
    q: Tensor, v: Tensor, mask: Tensor | None, launch: WindowLaunch, series: Series | None
) -> dict[str, object]:
    """Return what both kernels are specialised for."""
    rank = 0 if series is None else series.low_k.shape[1] - 1
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "BD": _padded(q.shape[-1]),
        "BDV": _padded(v.shape[-1]),
        "BN": launch.keys,
        "RANK": rank,
        "BR": _padded(max(rank, 1)),
        "TERMS": 0 if series is None else series.terms,
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


def _launch(q: Tensor, v: Tensor, mask: Tensor | None, series: Series | None) -> WindowLaunch:
    """Return the stored configuration for these tensors."""
    width = _padded(max(q.shape[-1], v.shape[-1]))
    return window_launch(device_target(q.device), q.dtype, width, mask is not None, series is not None)


def _series(series: Series | None, nothing: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[float, float]]:
    """Return the kernels' arguments of a series: six tensors, two pitches and the queries of a group, two factors."""
    if series is None:
        return (nothing,) * 6, (0, 0, 0), (0.0, 0.0)
    low_k = series.low_k
    tensors = (series.low_q, series.offset, series.numerator, series.denominator, low_k, series.weights)
    sizes = (series.low_q.stride(1), low_k.stride(1), series.denominator.stride(0))
    return tensors, sizes, (series.weight, series.weight / series.keys)


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
    series: Series | None,
) -> None:
    """Run ``window_fwd_kernel`` and write ``out`` and ``lse``."""
    batch, heads, queries, _ = q.shape
    if q.numel() == 0:
        return
    launch = _launch(q, v, mask, series)
    tensors, sizes, factors = _series(series, lse)
    window_fwd_kernel[(triton.cdiv(queries, launch.queries), batch * heads)](
        q, k, v, q if mask is None else mask, out, lse, *tensors,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        0 if mask is None else mask.stride(0), *sizes,
        heads, queries, k.shape[2], window, prefix, chunk, scale * _LOG2_E, *factors,
        BM=launch.queries, **_constants(q, v, mask, launch, series),
    )  # fmt: skip


def _launch_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    others: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    *,
    grid: TokenGrid,
    radius: tuple[int, int],
    scale: float,
    series: Series | None,
    outside: Series | None,
) -> None:
    """Run ``window_2d_fwd_kernel`` for the queries of one grid and write ``out`` and ``lse`` at their places."""
    batch, heads = q.shape[:2]
    if q.numel() == 0:
        return
    launch = _launch(q, v, mask, series)
    tensors, (pitch_q, pitch_k, sums), factors = _series(series, lse)
    (*_, low_out, weights_out), (_, pitch_out, _), _ = _series(outside, lse)
    k_out, v_out, mask_out = others
    tiles = triton.cdiv(grid.rows, launch.rows) * triton.cdiv(grid.columns, launch.columns)
    window_2d_fwd_kernel[(tiles, batch * heads)](
        q, k, v, q if mask is None else mask, k_out, v_out, q if mask_out is None else mask_out, out, lse,
        *tensors, low_out, weights_out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_out.stride()[:3], *v_out.stride()[:3],
        *out.stride()[:3], *lse.stride()[:2],
        0 if mask is None else mask.stride(0), 0 if mask_out is None else mask_out.stride(0),
        pitch_q, pitch_k, pitch_out, sums,
        heads, k_out.shape[2], grid.start, grid.rows, grid.columns,
        min(radius[0], grid.rows), min(radius[1], grid.columns), scale * _LOG2_E, *factors,
        TR=launch.rows, TC=launch.columns, **_constants(q, v, mask, launch, series),
    )  # fmt: skip
