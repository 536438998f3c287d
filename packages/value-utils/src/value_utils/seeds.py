"""Batches of seeds that are the same on every machine."""

import random

MAX_SEED = 2**64 - 1
"""The largest seed that image hosts accept."""


def seed_batch(seed: int, count: int, *, min_value: int = 0, max_value: int = MAX_SEED) -> list[int]:
    """Draw seeds from one seed.

    The draws are those of ``random.Random(seed)``, the same in every Python version; a longer batch begins with the
    shorter one. Seeds are independent draws, so a narrow range repeats some.

    Args:
        seed: Start of the sequence, 0 or more.
        count: How many seeds, 1 or more.
        min_value: Smallest seed, 0 or more.
        max_value: Largest seed, included.

    Returns:
        ``count`` seeds in ``[min_value, max_value]``.

    Raises:
        ValueError: An argument is not a whole number or out of its range.
    """
    arguments = {"seed": seed, "count": count, "min_value": min_value, "max_value": max_value}
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    if seed < 0:
        # random.Random takes the absolute value, so -5 would silently be the batch of 5.
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if min_value < 0 or max_value < min_value:
        raise ValueError(f"seeds need 0 <= min_value <= max_value, got min_value {min_value}, max_value {max_value}")
    draw = random.Random(seed)
    return [min_value + draw.randrange(max_value - min_value + 1) for _ in range(count)]
