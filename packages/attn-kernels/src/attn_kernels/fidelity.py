"""How far an attention is from exact attention: its output, and the weights behind it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale

FLOOR = 1e-9
"""Weight to which smaller ones, zero and negative ones included, are raised in a divergence."""
PROBE_CHUNK = 128
"""Keys whose weights one run of an operator yields."""


class Fidelity(NamedTuple):
    """Distances of an output from its target; 0 = equal.

    Attributes:
        relative_l2: Norm of the difference over the norm of the target, over the whole tensor.
        cosine_distance: Mean over tokens and heads of one minus the cosine of the two vectors.
        nmse: Square of ``relative_l2``: mean squared error over the target's mean square.
        cosine_p95: Smallest cosine distance that 95 % of the tokens and heads do not exceed.
        cosine_p99: The same for 99 %.
    """

    relative_l2: float
    cosine_distance: float
    nmse: float
    cosine_p95: float
    cosine_p99: float


class WeightFidelity(NamedTuple):
    """Distances of an approximation's weights from the softmax weights, over sampled queries and all heads.

    Attributes:
        kl: Mean of ``KL(exact || approximation)`` in nats.
        kl_p95: Smallest divergence that 95 % of the queries and heads do not exceed.
        top_k_overlap: Mean share of the heaviest keys of exact attention that are among the approximation's heaviest.
    """

    kl: float
    kl_p95: float
    top_k_overlap: float


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between the vectors of each token and head.

    A vector of zeros has distance 1 to any other and 0 to another of zeros.

    Args:
        output: ``[B, H, N, Dv]``.
        target: ``[B, H, N, Dv]``.

    Returns:
        ``[B, H, N]`` in float32 (float64 for float64 input), from 0 to 2.

    Raises:
        ValueError: Shapes differ.
    """
    a, b = _wide(output, target)
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    cosine = (a * b).sum(dim=-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    both_zero = (a.abs().amax(dim=-1) == 0) & (b.abs().amax(dim=-1) == 0)
    return torch.where(both_zero, 0.0, 1.0 - cosine)


def relative_l2(output: Tensor, target: Tensor) -> Tensor:
    """Norm of the difference over the norm of the target, ``[]``.

    Args:
        output: Any shape.
        target: The same shape.

    Raises:
        ValueError: Shapes differ.
    """
    a, b = _wide(output, target)
    error: Tensor = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
    return error


def fidelity(output: Tensor, target: Tensor) -> Fidelity:
    """Measure an output against its target; waits for the device, so keep it off the attention path.

    Args:
        output: ``[B, H, N, Dv]``.
        target: ``[B, H, N, Dv]``.

    Raises:
        ValueError: Shapes differ.
    """
    error = relative_l2(output, target).item()
    distances = cosine_distance(output, target)
    tails = (upper_quantile(distances, share).item() for share in (0.95, 0.99))
    return Fidelity(error, distances.mean().item(), error**2, *tails)


def upper_quantile(values: Tensor, share: float) -> Tensor:
    """Return the smallest value that a share of the values does not exceed, ``[]``; NaN if any value is.

    Unlike ``torch.quantile`` it takes any number of values.

    Args:
        values: ``[...]``, at least one.
        share: From 0 to 1.

    Raises:
        ValueError: There is no value, or the share is out of range.
    """
    if values.numel() == 0 or not 0.0 <= share <= 1.0:
        raise ValueError(f"need at least one value and a share in [0, 1], got {tuple(values.shape)} and {share}")
    # Rounded first: 0.95 * 20 is a little more than 19.
    rank = max(1, math.ceil(round(share * values.numel(), 6)))
    found = values.flatten().kthvalue(rank).values
    return torch.where(values.isnan().any(), torch.nan, found)


def sampled_attention(
    q: Tensor, k: Tensor, index: Tensor, *, scale: float | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Weights of exact attention for some of the queries.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        index: ``[S]`` int64, positions of the queries.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. Masked keys have weight 0; where all are masked, every weight is 0.

    Returns:
        ``[B, H, S, Nk]`` in float32 (float64 for float64 input).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    check_qkv(q, k, k)
    check_key_mask(key_mask, k)
    _check_index(index)
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.index_select(2, index).to(wide)
    scores = resolve_scale(scale, q.shape[-1]) * (rows @ k.to(wide).mT)
    if key_mask is None:
        return scores.softmax(dim=-1)
    drop = ~key_mask[:, None, None, :]
    # The softmax of nothing but -inf is NaN.
    weights = scores.masked_fill(drop, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(drop, 0.0)


def probed_attention(
    operator: Callable[[Tensor], Tensor], v: Tensor, index: Tensor | None = None, *, chunk: int = PROBE_CHUNK
) -> Tensor:
    """Weights with which an operator averages the values, found by giving it unit vectors as values.

    Column c of the values is one at a single key and zero elsewhere, so column c of the output holds that key's
    weights. Right for every operator that is linear in the values; it runs ``Nk / chunk`` times.

    Args:
        operator: Computes ``[B, H, Nq, C]`` for values ``[B, H, Nk, C]``, with everything else bound.
        v: ``[B, H, Nk, Dv]``; only its sizes, dtype and device matter.
        index: ``[S]`` int64, positions of the queries; ``None`` = all rows of the output.
        chunk: Columns C of values in one run.

    Returns:
        ``[B, H, S, Nk]``, at least float32. Weights may be negative (a truncated series) and need not sum to one.

    Raises:
        ValueError: ``index`` is no list of positions, or ``chunk`` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if index is not None:
        _check_index(index)
    batch, heads, keys, _ = v.shape
    columns = []
    for start in range(0, keys, chunk):
        count = min(chunk, keys - start)
        probes = torch.zeros(keys, count, dtype=v.dtype, device=v.device)
        probes[start : start + count].fill_diagonal_(1.0)
        out = operator(probes.expand(batch, heads, keys, count))
        columns.append(out if index is None else out.index_select(2, index))
    weights = torch.cat(columns, dim=-1)
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def attention_kl(exact: Tensor, approximate: Tensor, *, floor: float = FLOOR) -> Tensor:
    """Kullback-Leibler divergence of an approximation's weights from exact ones, in nats.

    The approximation's weights are raised to ``floor`` and normalised to one before: a key that it drops costs its
    exact weight times the logarithm of that weight over the floor, rather than infinity.

    Args:
        exact: ``[B, H, S, Nk]``, each row sums to one, or to zero (no key): distance zero.
        approximate: ``[B, H, S, Nk]``.
        floor: Smallest weight of the approximation.

    Returns:
        ``[B, H, S]``; NaN where a weight is.

    Raises:
        ValueError: Shapes differ, or ``floor`` is not positive.
    """
    p, q = _wide(exact, approximate)
    if not floor > 0.0:
        raise ValueError(f"floor must be positive, got {floor}")
    q = q.clamp_min(floor)
    q = q / q.sum(dim=-1, keepdim=True)
    divergence: Tensor = (torch.special.xlogy(p, p) - p * q.log()).sum(dim=-1)
    return divergence


def top_k_overlap(exact: Tensor, approximate: Tensor, count: int) -> Tensor:
    """Share of the ``count`` heaviest keys of exact attention that are among the approximation's heaviest.

    Keys of equal weight, as those of a pooled tile, are ranked in an order that the device chooses.

    Args:
        exact: ``[B, H, S, Nk]``.
        approximate: ``[B, H, S, Nk]``.
        count: Number of keys, from 1 to Nk.

    Returns:
        ``[B, H, S]`` from 0 to 1.

    Raises:
        ValueError: Shapes differ, or ``count`` is out of range.
    """
    p, q = _wide(exact, approximate)
    if not 1 <= count <= p.shape[-1]:
        raise ValueError(f"count must be from 1 to the {p.shape[-1]} keys, got {count}")
    heavy = torch.zeros_like(p).scatter_(-1, p.topk(count, dim=-1).indices, 1.0)
    return heavy.gather(-1, q.topk(count, dim=-1).indices).mean(dim=-1)


def weight_fidelity(exact: Tensor, approximate: Tensor, *, count: int = 32) -> WeightFidelity:
    """Measure an approximation's weights against exact ones; waits for the device.

    Args:
        exact: ``[B, H, S, Nk]``, of ``sampled_attention``.
        approximate: ``[B, H, S, Nk]``, of ``probed_attention``.
        count: Keys in ``top_k_overlap``.

    Raises:
        ValueError: Shapes differ, or ``count`` is out of range.
    """
    divergence = attention_kl(exact, approximate)
    overlap = top_k_overlap(exact, approximate, count)
    return WeightFidelity(divergence.mean().item(), upper_quantile(divergence, 0.95).item(), overlap.mean().item())


def _check_index(index: Tensor) -> None:
    """Check positions of queries."""
    if index.ndim != 1 or index.dtype is not torch.int64 or index.numel() == 0:
        raise ValueError(f"index must be int64 [S] with S >= 1, got {index.dtype} {tuple(index.shape)}")


def _wide(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the shapes agree and cast both to at least float32."""
    if output.shape != target.shape:
        raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} differ in shape")
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return output.to(wide), target.to(wide)
