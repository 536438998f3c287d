"""From sums over the keys to a partial: the division, the normaliser, and the queries that have no answer."""

import torch
from torch import Tensor

from attn_kernels.partial import Partial


def normalise(denominator: Tensor, total: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Turn denominators into factors of the sums, and mark the queries that have none.

    A truncated series with an even number of terms may be negative, so a denominator may be too: such a query has no
    normaliser and no partial. It gets NaN, which no merge and no sum turns into a finite number.

    Args:
        denominator: ``[..., N]``.
        total: ``[..., 1]``, sum of the key weights, 0 where every key is masked.
        offset: ``[..., N]``, what the logits of each query lost by centring.
        eps: Smallest denominator as a share of ``total``.

    Returns:
        The factor ``1 / denominator``, ``[..., N]``, NaN where there is none and 0 where every key is masked; and
        ``lse``, ``[..., N]``, NaN and ``-inf`` in these places.
    """
    # An infinite denominator would turn finite sums into zeros; comparisons with NaN are False.
    valid = (denominator > eps * total) & (denominator < torch.inf)
    divisor = torch.where(valid, denominator, 1)
    empty = total == 0
    factor = torch.where(empty, 0, torch.where(valid, 1 / divisor, torch.nan))
    return factor, torch.where(empty, -torch.inf, torch.where(valid, torch.log(divisor) + offset, torch.nan))


def join_blocks(parts: list[Partial]) -> Partial:
    """Put the blocks of independent sub-heads side by side.

    Each block has a normaliser of its own, so the whole has none: ``lse`` is NaN, or ``-inf`` where no block has keys.

    Args:
        parts: One partial per block, ``[..., N, Dv / blocks]``.

    Returns:
        ``Partial``; the only block itself if there is one.
    """
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], dim=-1), blocks_lse([part.lse for part in parts]))


def blocks_lse(lses: list[Tensor]) -> Tensor:
    """The ``lse`` of independent blocks together: NaN, or ``-inf`` where no block has keys."""
    empty = torch.stack([lse == -torch.inf for lse in lses]).amin(dim=0)
    return torch.where(empty, lses[0], torch.nan)
