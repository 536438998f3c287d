"""Partial attention: the answer over some of the keys, in a form that can be joined.

An operator that attends to a subset of the keys, or to all of them through a feature map, returns its normalised output
and the logarithm of its normaliser. Joining any number of such partials is then exact: it gives what one softmax over
the union of their keys would have given (the split-softmax identity of Milakov & Gimelshein 2018, "Online normalizer
calculation for softmax", eq. 4).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over a part of the keys.

    Attributes:
        out: ``[B, H, Nq, Dv]``, normalised over the part's keys; zero where the part has no key for a query.
        lse: ``[B, H, Nq]``, logarithm of the normaliser; ``-inf`` where the part has no key for a query.
    """

    out: Tensor
    lse: Tensor


def merge_partials(*partials: Partial) -> Partial:
    """Join partials under one denominator.

    The parts must hold disjoint sets of keys of the same queries. Differentiable in every input; a part whose ``lse``
    is ``-inf`` contributes nothing, and a query without keys in any part gets zeros and ``-inf``.

    Args:
        *partials: One or more partials with equal ``[B, H, Nq]`` and ``Dv``.

    Returns:
        The joined partial; ``out`` keeps the dtype of the first, ``lse`` is float32 (float64 for float64 input).

    Raises:
        ValueError: No partial was given, or their shapes differ.
    """
    if not partials:
        raise ValueError("merge_partials needs at least one Partial")
    first = partials[0]
    for index, part in enumerate(partials):
        if part.out.shape != first.out.shape or part.lse.shape != first.out.shape[:-1]:
            raise ValueError(
                f"partial {index} has out {tuple(part.out.shape)} and lse {tuple(part.lse.shape)}; "
                f"expected {tuple(first.out.shape)} and {tuple(first.out.shape[:-1])}"
            )
    if len(partials) == 1:
        return first
    wide = torch.promote_types(first.lse.dtype, torch.float32)
    lses = torch.stack([part.lse.to(wide) for part in partials])
    peak = lses.detach().amax(dim=0)
    # A query without any key has peak -inf; subtracting 0 instead keeps exp and its gradient finite.
    safe_peak = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
    weights = torch.exp(lses - safe_peak)
    total = weights.sum(dim=0)
    empty = total == 0
    divisor = torch.where(empty, torch.ones_like(total), total)
    shares = weights / divisor
    out = torch.zeros_like(first.out, dtype=torch.promote_types(first.out.dtype, wide))
    for share, part in zip(shares, partials, strict=True):
        # An empty part may carry any value in out, non-finite ones included; it must not leak through 0 * inf.
        value = torch.where((share == 0).unsqueeze(-1), 0, part.out)
        out = out + share.unsqueeze(-1) * value
    lse = torch.where(empty, torch.full_like(total, -torch.inf), torch.log(divisor) + safe_peak)
    return Partial(out.to(first.out.dtype), lse)
