"""A fixed linear image codec: patches of 4 x 4 pixels to 16 numbers, one token a patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATCH = 4


class PatchCodec(nn.Module):
    """Principal components of image patches, scaled towards equal variance.

    ``encode`` is ``(patch - mean) @ basis * scale`` with pixels in ``[-1, 1]``; ``decode`` is its least-squares
    inverse.

    Args:
        mean: ``[48]``, mean patch (rows, columns, colours).
        basis: ``[48, C]``, orthonormal columns.
        scale: ``[C]``.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        super().__init__()
        if mean.shape != (3 * PATCH * PATCH,) or basis.shape != (mean.shape[0], scale.shape[0]):
            raise ValueError(
                f"expected mean [48], basis [48, C], scale [C]; got {tuple(mean.shape)}, {tuple(basis.shape)}, "
                f"{tuple(scale.shape)}"
            )
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis.float())
        self.register_buffer("scale", scale.float())

    @property
    def channels(self) -> int:
        """Numbers per token, ``C``."""
        return self.scale.shape[0]

    @classmethod
    def fit(cls, images: Tensor, channels: int = 16) -> PatchCodec:
        """Fit to ``images`` ``[B, 3, h, w]`` in ``[0, 1]`` by principal components of their patches.

        A channel is divided by the square root of its standard deviation: in between leaving the spectrum as it is and
        whitening it, so that fine detail weighs in the loss without its noise taking over. All channels together have
        variance 1.
        """
        patches = _patches(images.float() * 2 - 1).flatten(0, 1)
        mean = patches.mean(dim=0)
        covariance = torch.cov((patches - mean).T)
        values, vectors = torch.linalg.eigh(covariance)
        deviation = values.flip(0)[:channels].clamp_min(1e-8).sqrt()
        scale = deviation.rsqrt() / deviation.mean().sqrt()
        basis = vectors.flip(1)[:, :channels]
        # The sign of an eigenvector is arbitrary: make the largest entry positive, so that equal data give equal codes.
        peak = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        return cls(mean, (basis * peak.sign()).contiguous(), scale)

    def encode(self, images: Tensor) -> Tensor:
        """Encode ``[B, 3, h, w]`` in ``[0, 1]`` to ``[B, N, C]``, tokens in raster order.

        Raises:
            ValueError: Height or width is not a multiple of 4.
        """
        return (_patches(images.to(self.mean) * 2 - 1) - self.mean) @ self.basis * self.scale

    def decode(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        """Decode ``[B, N, C]`` to images ``[B, 3, 4 * rows, 4 * columns]`` clamped to ``[0, 1]``.

        Raises:
            ValueError: N is not ``rows * columns``, or C is not the codec's.
        """
        if latent.ndim != 3 or latent.shape[1:] != (rows * columns, self.channels):
            raise ValueError(f"latent must be [B, {rows * columns}, {self.channels}], got {tuple(latent.shape)}")
        patches = (latent.to(self.mean) / self.scale) @ self.basis.T + self.mean
        grid = patches.reshape(-1, rows, columns, PATCH, PATCH, 3).permute(0, 5, 1, 3, 2, 4)
        pixels = grid.reshape(-1, 3, rows * PATCH, columns * PATCH)
        return ((pixels + 1) / 2).clamp(0, 1)


def _patches(images: Tensor) -> Tensor:
    """Cut ``[B, 3, h, w]`` into ``[B, N, 48]``."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % PATCH or images.shape[3] % PATCH:
        raise ValueError(f"images must be [B, 3, h, w] with h and w multiples of {PATCH}, got {tuple(images.shape)}")
    batch, _, height, width = images.shape
    grid = images.reshape(batch, 3, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    return grid.reshape(batch, -1, 3 * PATCH * PATCH)
