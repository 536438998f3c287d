"""Data and comparisons for tests of attention operators."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.grid import TokenGrid


def make_qkv(
    batch: int,
    heads: int,
    tokens: int,
    width: int,
    *,
    logit_std: float = 2.0,
    kv_tokens: int | None = None,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    smooth_grid: TokenGrid | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values whose scores spread as those of a trained model.

    The scores ``q . k / sqrt(D)`` have standard deviation ``logit_std``; with unit-norm q and k they would be almost
    equal, and the mean of v would pass for attention.

    Args:
        batch: B.
        heads: H.
        tokens: Number of queries.
        width: D.
        logit_std: Standard deviation of the scores; 1 to 4 is realistic.
        kv_tokens: Number of keys; as many as queries if ``None``.
        value_width: Dv; D if ``None``.
        dtype: Dtype of the tensors; they are drawn in float32.
        seed: Seed of the draw.
        smooth_grid: Grid whose tokens get fields that vary smoothly in two dimensions, as those of an image, over
            noise of half their strength; all three tensors, so self-attention only.

    Returns:
        q ``[B, H, Nq, D]``, k ``[B, H, Nk, D]``, v ``[B, H, Nk, Dv]``.

    Raises:
        ValueError: ``smooth_grid`` does not fit the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = tokens if kv_tokens is None else kv_tokens
    sizes = ((tokens, width), (keys, width), (keys, width if value_width is None else value_width))
    if smooth_grid is not None and smooth_grid.stop > min(tokens, keys):
        raise ValueError(f"smooth_grid {smooth_grid} must end by {min(tokens, keys)} tokens")
    tensors = []
    for count, columns in sizes:
        tensor = torch.randn(batch, heads, count, columns, generator=generator)
        if smooth_grid is not None:
            field = _smooth_field(batch * heads, columns, smooth_grid, generator).view(batch, heads, -1, columns)
            noise = 0.5 * tensor[:, :, smooth_grid.start : smooth_grid.stop]
            tensor[:, :, smooth_grid.start : smooth_grid.stop] = (field + noise) / 1.25**0.5
        tensors.append(tensor)
    q, k, v = tensors
    # The product of two unit normal vectors over sqrt(D) has standard deviation 1.
    return (q * logit_std).to(dtype), k.to(dtype), v.to(dtype)


def _smooth_field(count: int, columns: int, grid: TokenGrid, generator: torch.Generator) -> Tensor:
    """Draw ``[count, grid.tokens, columns]`` of unit variance that varies over about a quarter of the grid."""
    coarse = torch.randn(count, columns, 5, 5, generator=generator)
    field = F.interpolate(coarse, size=(grid.rows, grid.columns), mode="bicubic", align_corners=True)
    return (field / field.std()).flatten(2).transpose(1, 2)


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected``, in float64; NaN if a value is not finite.

    Args:
        actual: Any shape, ``[...]``.
        expected: The same shape, ``[...]``.
    """
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return float(difference)


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float) -> None:
    """Assert that two tensors agree to a relative error of their norms.

    Args:
        name: What is compared, for the message.
        actual: The result.
        expected: What it should be, the same shape.
        ratio: Largest norm of the difference over the norm of ``expected``.

    Raises:
        AssertionError: Shapes differ, a value is not finite where the other is, or the error is larger.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    # Equal infinities agree; any other place that is not finite makes the error NaN and fails.
    infinite = torch.isinf(expected) & (actual == expected)
    error = error_ratio(actual.masked_fill(infinite, 0), expected.masked_fill(infinite, 0))
    assert error <= ratio, f"{name}: relative error {error:.3g} exceeds {ratio:.3g}"
