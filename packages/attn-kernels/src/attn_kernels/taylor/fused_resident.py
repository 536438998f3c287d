"""Triton kernel for 4 terms in 16 coordinates: the queries read sums that stay in shared memory.

Features of degree 3 are never made. With pairs ``psi2(q)`` of coordinates, the sums of degree 3 are read as ``sum_k q_k
(psi2(q) S[k])``: 160 products per query instead of 816, rounded once. Pairs come in 10 tiles of 4 x 4 coordinates
(a <= b), the third factor in groups c >= b of 4, so a product of 16 pairs by 4 x 16 columns is one matrix
instruction and 1,280 rows stand for 816 monomials; the sums of the redundant ones are 0. The sums of a group are
50 KiB in half precision and are loaded once for many blocks of queries.
"""

# Device functions have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.taylor.fused_kernels import operand, store_answer

WIDTH = 16
"""Coordinates of a token, and the most value columns."""
_TILES = tuple((a, b) for b in range(4) for a in range(b + 1))


@triton.jit
def taylor_resident_kernel(
    QT, S3, S2, S1, S0, Z3, Z2, Z1, OFFSET, TOTAL, OUT, LSE,
    stride_b, stride_h, stride_n, heads, blocks, queries, pitch, rounds, eps,
    DV: tl.constexpr, BQ: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Answer ``rounds`` blocks of ``BQ`` queries of one group.

    QT ``[G, 17, pitch]``; S3 ``[G, 20, 16, 64]``, S2 ``[G, 10, 16, 16]``, S1 ``[G, 16, 16]``, Z3 ``[G, 10, 16, 16]``
    and Z2 ``[G, 16, 16]`` in the dtype of the product; S0 ``[G, 16]`` and Z1 ``[G, 17]`` (the last of degree 0) fp32.
    OUT ``[B, H, queries, blocks * DV]``, LSE ``[G, queries]``.
    """
    group = tl.program_id(1)
    wide = group.to(tl.int64)
    r = tl.arange(0, 16)
    r4 = tl.arange(0, 4)
    r64 = tl.arange(0, 64)
    s3 = ()
    for t in tl.static_range(20):
        s = tl.load(S3 + (wide * 20 + t) * 1024 + r[:, None] * 64 + r64[None, :])
        s3 = s3 + (operand(s.to(tl.float32), DTYPE, INTERPRET),)  # noqa: RUF005
    s2 = ()
    z3 = ()
    for t in tl.static_range(10):
        place = (wide * 10 + t) * 256 + r[:, None] * 16 + r[None, :]
        s2 = s2 + (operand(tl.load(S2 + place).to(tl.float32), DTYPE, INTERPRET),)  # noqa: RUF005
        z3 = z3 + (operand(tl.load(Z3 + place).to(tl.float32), DTYPE, INTERPRET),)  # noqa: RUF005
    s1 = operand(tl.load(S1 + wide * 256 + r[:, None] * 16 + r[None, :]).to(tl.float32), DTYPE, INTERPRET)
    s0 = tl.load(S0 + wide * 16 + r)
    z2 = operand(tl.load(Z2 + wide * 256 + r[:, None] * 16 + r[None, :]).to(tl.float32), DTYPE, INTERPRET)
    z1 = tl.load(Z1 + wide * 17 + r)
    z0 = tl.load(Z1 + wide * 17 + 16)
    QT += wide * 17 * pitch + pitch
    for turn in range(0, rounds):
        n = (tl.program_id(0) * rounds + turn) * BQ + tl.arange(0, BQ)
        there = n < queries
        # The rows go on with zeros to pitch, a multiple of 16: up to there loads stay wide.
        padded = n < pitch
        q = tl.load(QT + r[None, :] * pitch + n[:, None], mask=padded[:, None], other=0.0).to(tl.float32)
        rounded = operand(q, DTYPE, INTERPRET)
        num = tl.dot(rounded, s1) + s0[None, :]
        # The denominator is z0 + q . z with z = z1 + Z2 q + Z3 psi2(q).
        z = tl.dot(rounded, z2) + z1[None, :]
        pairs = ()
        for b in tl.static_range(4):
            for a in tl.static_range(b + 1):
                left = tl.load(QT + (4 * a + r // 4)[None, :] * pitch + n[:, None], mask=padded[:, None], other=0.0)
                right = tl.load(QT + (4 * b + r % 4)[None, :] * pitch + n[:, None], mask=padded[:, None], other=0.0)
                pair = left.to(tl.float32) * right.to(tl.float32)  # [BQ, 16]
                pairs = pairs + (operand(pair, DTYPE, INTERPRET),)  # noqa: RUF005
        for t in tl.static_range(10):
            num = tl.dot(pairs[t], s2[t], num)
            z = tl.dot(pairs[t], z3[t], z)
        den = z0 + tl.sum(z * q, 1)
        for c in tl.static_range(4):
            y = tl.zeros((BQ, 64), tl.float32)
            for t in tl.static_range((c + 1) * (c + 2) // 2):
                y = tl.dot(pairs[t], s3[c * (c + 1) * (c + 2) // 6 + t], y)
            third = tl.load(QT + (4 * c + r4)[None, :] * pitch + n[:, None], mask=padded[:, None], other=0.0)
            num += tl.sum(tl.reshape(y, (BQ, 4, 16)) * third.to(tl.float32)[:, :, None], 1)
        store_answer(
            num, den, OFFSET, TOTAL, OUT, LSE, group, n, there, r, pitch, stride_b, stride_h, stride_n, queries, heads,
            blocks, eps, DV, DTYPE, INTERPRET,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _places(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ranks of the features in the order of the kernel; 969, one past the last, stands for a redundant one.

    Returns:
        Those of degree 3 ``[20 * 16 * 4]``, of degree 2 ``[10 * 16]``, of degree 1 ``[16]``, of degree 3 again with all
        third factors of a tile beside each other ``[10 * 16 * 16]``, and of degree 2 again as a matrix ``[16 * 16]``.
    """
    r = torch.arange(16, device=device)
    threes, twos, columns = [], [], []
    for number, (a, b) in enumerate(_TILES):
        i, j = 4 * a + r // 4, 4 * b + r % 4
        twos.append(torch.where(i <= j, _rank(j + 1, i + 1, torch.zeros_like(i)), 969))
        i, j = i[:, None], j[:, None]
        rank = torch.where((i <= j) & (j <= r), _rank(r + 1, j + 1, i + 1), 969)  # [16, 16]
        columns.append(rank.flatten())
        threes += [(c, number, rank[:, 4 * c : 4 * c + 4].flatten()) for c in range(b, 4)]
    threes.sort(key=lambda entry: entry[:2])
    zero = torch.zeros_like(r)
    ordered = torch.cat([rank for *_, rank in threes])
    square = torch.where(r[:, None] <= r, _rank(r + 1, r[:, None] + 1, zero), 969).flatten()
    return ordered, torch.cat(twos), _rank(r + 1, zero, zero), torch.cat(columns), square


def _rank(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Rank in colexicographic order of monomials of degree 3 with indices ``first >= second >= third``."""
    return (first + 2) * (first + 1) * first // 6 + (second + 1) * second // 2 + third


def arrange(state: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bring sums into the order of ``taylor_resident_kernel``.

    Args:
        state: ``[G, 969, Dv]`` in the dtype of the product, features in colexicographic order.
        normaliser: ``[G, 969]`` fp32.

    Returns:
        S3, S2, S1, S0, Z3, Z2 and Z1 of the kernel.
    """
    groups = state.shape[0]
    state = torch.nn.functional.pad(state, (0, WIDTH - state.shape[-1], 0, 1))
    normaliser = torch.nn.functional.pad(normaliser, (0, 1))
    three, two, one, wanted, square = _places(state.device)
    z3 = normaliser.index_select(1, wanted).to(state.dtype).contiguous()
    s3 = state.index_select(1, three).view(groups, 20, 16, 4 * WIDTH)
    first = torch.cat([one, torch.zeros_like(one[:1])])
    return (
        s3,
        state.index_select(1, two),
        state.index_select(1, one),
        state[:, 0].float().contiguous(),
        z3,
        normaliser.index_select(1, square).to(state.dtype),
        normaliser.index_select(1, first),
    )
