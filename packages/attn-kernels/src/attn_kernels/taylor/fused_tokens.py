"""What the kernels of the features read: means, key weights, and tokens turned so that a coordinate is a row."""

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.taylor.fused_centring import taylor_key_mean_kernel, taylor_sum_kernel, taylor_turn_kernel
from attn_kernels.triton_support import interpreted

DTYPES = MappingProxyType({torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16})
"""Triton's names of the dtypes of a product."""
TOKENS = 64
"""Tokens handled at a time by the kernels before the features."""
_PROGRAMS = 1024
"""Programs of a kernel over splits of the keys to aim at: a few for each multiprocessor of a large device."""


@dataclass(frozen=True, eq=False)
class Tokens:
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
        factors: ``[G, P, Nq]`` fp32, in row c the factor of a query's features in which the constant stands c times;
            ``None`` = all are 1.
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
    factors: Tensor | None = None

    @property
    def width(self) -> int:
        """D of a block."""
        return self.turned_k.shape[1] - 1


@dataclass(frozen=True, eq=False)
class Means:
    """Means of queries and keys, and what the key weights are divided by; all fp32, BD = D of a block, padded.

    Attributes:
        query: ``[G, BD]``; zero without centring.
        key: ``[G, BD]``, under the weights; zero without centring.
        shift: ``[G]``, logarithm of the sum of the weights.
        total: ``[G]``, their sum below the largest; 0 = every key is masked.
    """

    query: Tensor
    key: Tensor
    shift: Tensor
    total: Tensor


def padded_width(width: int) -> int:
    """Return the power of two, 16 at least, that holds a width."""
    return max(16, 1 << (width - 1).bit_length())


def find_means(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, *, centred: bool, blocks: int = 1) -> Means:
    """Find means and key weights.

    Args:
        q: ``[B, H, Nq, blocks * D]``, all queries; last axis contiguous.
        k: ``[B, H, Nk, blocks * D]``, likewise.
        mask: ``[B, Nk]`` uint8, contiguous, or ``None``.
        scale: Score scale.
        centred: Whether there are means.
        blocks: Blocks of a head.
    """
    batch, heads, queries, width = q.shape
    groups, keys, width = batch * heads * blocks, k.shape[2], width // blocks
    padded = padded_width(width)
    sizes = {"D": width, "BD": padded, "BN": TOKENS}
    query_mean = q.new_zeros(groups, padded, dtype=torch.float32)
    if centred:
        span, splits = spans(queries, groups)
        sums = query_mean.new_empty(splits, groups, padded)
        taylor_sum_kernel[(splits, groups)](
            q, sums, *q.stride()[:3], heads, blocks, queries, span, num_warps=4, **sizes
        )
        query_mean = sums.sum(dim=0) / max(queries, 1)
    span, splits = spans(keys, groups)
    peaks, totals = query_mean.new_empty(2, splits, groups).unbind()
    sums = query_mean.new_empty(splits, groups, padded)
    taylor_key_mean_kernel[(splits, groups)](
        k, q if mask is None else mask, query_mean, peaks, totals, sums, *k.stride()[:3],
        0 if mask is None else mask.stride(0), heads, blocks, keys, span, scale,
        HAS_MASK=mask is not None, num_warps=4, **sizes,
    )  # fmt: skip
    shift = peaks.amax(dim=0)
    fade = torch.exp(peaks - torch.where(shift == -torch.inf, 0, shift))
    total = (totals * fade).sum(dim=0)
    divisor = torch.where(total == 0, 1, total)
    key_mean = (sums * fade.unsqueeze(-1)).sum(dim=0) / divisor.unsqueeze(-1)
    # A peak of -inf is that of no key at all, whose weights are 0 whatever they are divided by.
    shift = torch.where(shift == -torch.inf, 0, shift) + torch.log(divisor)
    return Means(query_mean, key_mean if centred else torch.zeros_like(key_mean), shift, total)


def turn_tokens(
    x: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    direction: Tensor,
    shift: Tensor,
    *,
    root: float,
    scale: float,
    keys: bool,
    dtype: torch.dtype,
    blocks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Centre tokens and write them with a coordinate per row: the arguments of ``taylor_turn_kernel``.

    Args:
        x: ``[B, H, N, blocks * D]``; last axis contiguous.
        mask: ``[B, N]`` uint8, contiguous, or ``None``.
        mean: ``[G, BD]`` fp32, what is taken off.
        direction: ``[G, BD]`` fp32, with which tokens are multiplied.
        shift: ``[G]`` fp32.
        root: Factor of the centred tokens.
        scale: Factor of the products with ``direction``.
        keys: Whether these are keys, which get weights instead of offsets.
        dtype: Dtype of the rows.
        blocks: Blocks of a head.

    Returns:
        Rows ``[G, D + 1, pitch]`` behind a row of ones, and weights or offsets ``[G, pitch]`` fp32.
    """
    width, count = x.shape[-1] // blocks, x.shape[2]
    rows, dots = new_rows(x, width, dtype, blocks)
    taylor_turn_kernel[(triton.cdiv(rows.shape[-1], TOKENS), rows.shape[0])](
        x, x if mask is None else mask, mean, direction, shift, rows, dots, *x.stride()[:3],
        0 if mask is None else mask.stride(0), x.shape[1], blocks, count, rows.shape[-1], root, scale,
        D=width, BD=padded_width(width), BN=TOKENS, KEYS=keys, HAS_MASK=mask is not None, DTYPE=DTYPES[dtype],
        INTERPRET=interpreted(), num_warps=4,
    )  # fmt: skip
    return rows, dots


def new_rows(x: Tensor, width: int, dtype: torch.dtype, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Return empty rows ``[G, width + 1, pitch]`` of ``dtype`` and dots ``[G, pitch]`` fp32 of tokens ``x``.

    Rows begin at multiples of 16 bytes, so that they come in wide loads.
    """
    groups, pitch = x.shape[0] * x.shape[1] * blocks, -(-x.shape[2] // 16) * 16
    return x.new_empty(groups, width + 1, pitch, dtype=dtype), x.new_empty(groups, pitch, dtype=torch.float32)


def prepare_tokens(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    *,
    centred: bool,
    blocks: int = 1,
    some: Tensor | None = None,
) -> Tokens:
    """Find means and weights, and turn the tokens.

    Args:
        q: ``[B, H, Nq, blocks * D]``, all queries.
        k: ``[B, H, Nk, blocks * D]``.
        key_mask: ``[B, Nk]`` bool, True = keep.
        scale: Score scale.
        dtype: Dtype of the product.
        centred: Whether means are taken out.
        blocks: Blocks of a head.
        some: ``[n]`` int64, the queries to turn; ``None`` = all.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    keys = k.shape[2]
    means = find_means(q, k, mask, scale, centred=centred, blocks=blocks)
    root = math.sqrt(abs(scale))
    chosen = q if some is None else q.index_select(2, some)
    turned_q, offset = turn_tokens(
        chosen, None, means.query, means.key, means.shift, root=math.copysign(root, scale), scale=scale, keys=False,
        dtype=dtype, blocks=blocks,
    )  # fmt: skip
    turned_k, weights = turn_tokens(
        k, mask, means.key, means.query, means.shift - math.log(keys), root=root, scale=scale, keys=True,
        dtype=dtype, blocks=blocks,
    )  # fmt: skip
    return Tokens(turned_q, turned_k, offset, weights, means.total, mask, blocks, chosen.shape[2], keys)


def spans(tokens: int, groups: int, tiles: int = 1, step: int = TOKENS) -> tuple[int, int]:
    """Cut tokens into equal spans, multiples of ``step``, for about ``_PROGRAMS`` programs: ``(span, splits)``."""
    splits = max(1, min(_PROGRAMS // max(1, groups * tiles), tokens // (4 * step)))
    span = -(-tokens // (splits * step)) * step
    return span, -(-tokens // span)
