"""Noise levels and starting noise of the tiny teacher (rectified flow, Flux's resolution-dependent shift)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LATENT_CHANNELS = 16
_FEW_TOKENS, _FEW_MU = 256, 0.5
_MANY_TOKENS, _MANY_MU = 4096, 1.15


def flux_shift(tokens: int) -> float:
    """Shift ``mu`` for a number of image tokens: linear from 0.5 at 256 to 1.15 at 4,096 tokens."""
    slope = (_MANY_MU - _FEW_MU) / (_MANY_TOKENS - _FEW_TOKENS)
    return _FEW_MU + slope * (tokens - _FEW_TOKENS)


def shift_time(time: Tensor, tokens: int) -> Tensor:
    """Move times towards 1 by ``exp(mu) / (exp(mu) + 1 / t - 1)``, as Flux does for larger images.

    Args:
        time: Any shape, e.g. ``[B]``, in ``(0, 1]``.
        tokens: Number of image tokens.
    """
    factor = math.exp(flux_shift(tokens))
    return factor / (factor + 1 / time - 1)


def sigma_schedule(steps: int, tokens: int) -> Tensor:
    """Noise levels of an Euler sampler, falling from 1 to 0.

    Args:
        steps: Number of steps.
        tokens: Number of image tokens.

    Returns:
        ``[steps + 1]`` float32; the last is 0.

    Raises:
        ValueError: ``steps`` or ``tokens`` is not positive.
    """
    if steps < 1 or tokens < 1:
        raise ValueError(f"steps and tokens must be at least 1, got steps={steps}, tokens={tokens}")
    times = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    return torch.cat([shift_time(times, tokens), torch.zeros(1, dtype=torch.float64)]).float()


def initial_noise(seeds: Sequence[int], rows: int, columns: int, channels: int = LATENT_CHANNELS) -> Tensor:
    """Starting noise, one generator a seed: an image is the same alone and in any batch.

    Args:
        seeds: One seed an image.
        rows: Rows of tokens.
        columns: Columns of tokens.
        channels: Numbers per token.

    Returns:
        ``[B, rows * columns, channels]`` float32 on the CPU.
    """
    draws = [
        torch.randn(rows * columns, channels, generator=torch.Generator("cpu").manual_seed(int(seed))) for seed in seeds
    ]
    return torch.stack(draws) if draws else torch.zeros(0, rows * columns, channels)
