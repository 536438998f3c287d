"""Which keys are landmarks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def landmark_budget(tokens: int, *, fraction: float, minimum: int, maximum: int) -> int:
    """Number of landmarks among ``tokens`` keys: a fraction, at least ``minimum``, at most ``maximum`` (0 = no cap).

    The cap wins over the minimum, and there are never more landmarks than tokens. A half is rounded to the even number.

    Raises:
        ValueError: A setting is out of range.
    """
    if not 0.0 <= fraction <= 1.0 or minimum < 0 or maximum < 0 or tokens < 0:
        raise ValueError(
            f"need fraction in [0, 1], minimum, maximum and tokens >= 0, got {fraction}, {minimum}, {maximum}, {tokens}"
        )
    count = max(minimum, round(tokens * fraction))
    return min(tokens, min(count, maximum) if maximum else count)


def strided_landmarks(
    length: int,
    exact: Sequence[tuple[int, int]],
    *,
    fraction: float = 0.08,
    minimum: int = 64,
    maximum: int = 512,
    device: torch.device | None = None,
) -> Tensor:
    """Choose landmarks evenly along the sequence, and every token of the exact ranges.

    The evenly spaced ones are taken from the tokens outside the exact ranges, first and last included; one landmark
    alone is the first.

    Args:
        length: Number of keys.
        exact: Half-open ranges of which all tokens are landmarks: text, references.
        fraction: Share of the other tokens.
        minimum: Fewest of them.
        maximum: Most of them; 0 = no cap.
        device: Where the indices go.

    Returns:
        Sorted indices, int64, at least one.

    Raises:
        ValueError: A range lies outside the keys, or a setting is out of range.
    """
    if length < 1:
        raise ValueError(f"landmarks need at least one key, got length {length}")
    kept = torch.zeros(length, dtype=torch.bool)
    for start, stop in exact:
        if not 0 <= start <= stop <= length:
            raise ValueError(f"exact range {(start, stop)} lies outside the {length} keys")
        kept[start:stop] = True
    others = torch.nonzero(~kept).squeeze(1)
    count = landmark_budget(others.numel(), fraction=fraction, minimum=minimum, maximum=maximum)
    if count > 0:
        # Float32 positions among the keys, rounded half to even: the rule of the first published students.
        first = int(others[0])
        places = torch.linspace(first, first + others.numel() - 1, count).round().long() - first
        kept[others[places]] = True
    chosen = torch.nonzero(kept).squeeze(1)
    return (chosen if chosen.numel() else torch.zeros(1, dtype=torch.int64)).to(device)
