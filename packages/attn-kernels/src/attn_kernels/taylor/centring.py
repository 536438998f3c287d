"""Centring: what of the logits can be taken out exactly, so that the series sees the residual only.

With mean query a and mean key b, ``q_i . k_j = (q_i - a) . b + a . k_j + (q_i - a) . (k_j - b)``. The first part is
common to all keys of a query and cancels in the softmax, the second is a weight ``exp(scale * a . k_j)`` of each key,
and only the third is expanded. b is the mean under these weights, which makes the weighted mean of the third part
zero for every query.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1024
"""Tokens converted to float32 at a time."""


class Centring(NamedTuple):
    """What is taken out of the logits; float32, or float64 for float64 input.

    Attributes:
        query_mean: ``[..., 1, D]``; zero without centring.
        key_mean: ``[..., 1, D]``, under the weights; zero without centring.
        weights: ``[..., Nk]``, the weight of each key, at most 1; 0 = masked.
        shift: ``[..., 1]``, logarithm of the factor by which the weights were divided.
        total: ``[..., 1]``, sum of the weights; 0 = every key is masked.
    """

    query_mean: Tensor
    key_mean: Tensor
    weights: Tensor
    shift: Tensor
    total: Tensor


def centre(q: Tensor, k: Tensor, *, scale: float, keep: Tensor | None, enabled: bool, chunk: int = CHUNK) -> Centring:
    """Find the means and the key weights, in memory linear in the tokens and differentiably.

    Args:
        q: ``[..., Nq, D]``.
        k: ``[..., Nk, D]``; masked keys may hold anything.
        scale: Score scale.
        keep: Bool, broadcastable to ``[..., Nk]``, False = masked; ``None`` = all are kept.
        enabled: False = means of zero and equal weights.
        chunk: Tokens handled at a time where the input is of lower precision.

    Returns:
        The centring.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if not enabled:
        weights = torch.ones(k.shape[:-1], dtype=wide, device=k.device)
        weights = weights if keep is None else weights * keep
        nothing = torch.zeros((*k.shape[:-2], 1, k.shape[-1]), dtype=wide, device=k.device)
        total = weights.sum(dim=-1, keepdim=True)
        return Centring(nothing, nothing, weights, torch.zeros_like(total), total)
    query_mean = _sum(q, chunk, wide) / max(q.shape[-2], 1)
    parts = [(query_mean @ part.transpose(-1, -2)).squeeze(-2) for part in _parts(k, keep, chunk, wide)]
    logits = scale * (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    shift = logits.detach().amax(dim=-1, keepdim=True)
    # Without any key the peak is -inf; 0 instead makes all weights 0.
    shift = torch.where(shift == -torch.inf, 0, shift)
    weights = torch.exp(logits - shift)
    total = weights.sum(dim=-1, keepdim=True)
    divisor = torch.where(total == 0, 1, total).unsqueeze(-1)
    start, weighted = 0, torch.zeros_like(query_mean)
    for part in _parts(k, keep, chunk, wide):
        stop = start + part.shape[-2]
        weighted = weighted + weights[..., None, start:stop] @ part
        start = stop
    return Centring(query_mean, weighted / divisor, weights, shift, total)


def key_covariance(k: Tensor, centring: Centring, *, keep: Tensor | None, chunk: int = CHUNK) -> Tensor:
    """Covariance of the keys under their weights, ``[..., D, D]``.

    Args:
        k: ``[..., Nk, D]``.
        centring: Of these keys.
        keep: As in ``centre``.
        chunk: Tokens handled at a time.
    """
    weights = centring.weights
    total = torch.zeros((*k.shape[:-2], k.shape[-1], k.shape[-1]), dtype=weights.dtype, device=k.device)
    for start in range(0, k.shape[-2], chunk):
        some = slice(start, start + chunk)
        part = k[..., some, :].to(weights.dtype)
        if keep is not None:
            part = part.masked_fill(~keep[..., some, None], 0)
        centred = part - centring.key_mean
        total = total + (centred * weights[..., some, None]).transpose(-1, -2) @ centred
    return total / torch.where(centring.total == 0, 1, centring.total).unsqueeze(-1)


def _sum(x: Tensor, chunk: int, wide: torch.dtype) -> Tensor:
    """Sum of tokens ``[..., N, D]``, ``[..., 1, D]``."""
    total = torch.zeros((*x.shape[:-2], 1, x.shape[-1]), dtype=wide, device=x.device)
    for part in _parts(x, None, chunk, wide):
        total = total + part.sum(dim=-2, keepdim=True)
    return total


def _parts(x: Tensor, keep: Tensor | None, chunk: int, wide: torch.dtype) -> Iterator[Tensor]:
    """Give tokens ``[..., N, D]`` in order, in the wide dtype and zero where masked; all at once where that is free."""
    step = max(x.shape[-2], 1) if keep is None and x.dtype == wide else chunk
    for start in range(0, x.shape[-2], step):
        part = x[..., start : start + step, :].to(wide)
        if keep is not None:
            part = part.masked_fill(~keep[..., start : start + step, None], 0)
        yield part
