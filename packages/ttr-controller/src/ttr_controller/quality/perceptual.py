"""Image similarity without learnt weights: PSNR and SSIM.

SSIM follows Wang, Bovik, Sheikh & Simoncelli 2004, "Image quality assessment: from error visibility to structural
similarity", eq. 13 with its published constants: an 11 x 11 Gaussian window of standard deviation 1.5, K1 = 0.01,
K2 = 0.03, and only windows that lie wholly inside the image. Colour images get the mean over their channels.
"""

import torch
from torch import Tensor
from torch.nn import functional

WINDOW = 11
WINDOW_SIGMA = 1.5
K1 = 0.01
K2 = 0.03


def psnr(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB.

    Args:
        a: ``[B, C, H, W]``.
        b: ``[B, C, H, W]``.
        peak: Largest possible value.

    Returns:
        ``[B]`` float32; infinite for equal images.

    Raises:
        ValueError: Shapes are wrong or differ.
    """
    left, right = _image_pair(a, b)
    mean_square = (left - right).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(peak**2 / mean_square)


def image_error(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference, ``10 ** (-psnr / 20)``: PSNR as a distance that is 0 for equal images.

    Args:
        a: ``[B, C, H, W]`` in [0, 1].
        b: ``[B, C, H, W]`` in [0, 1].

    Returns:
        ``[B]`` float32.

    Raises:
        ValueError: Shapes are wrong or differ.
    """
    left, right = _image_pair(a, b)
    return (left - right).square().flatten(1).mean(dim=1).sqrt()


def ssim(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Mean structural similarity.

    Args:
        a: ``[B, C, H, W]``, H and W at least 11.
        b: ``[B, C, H, W]``.
        peak: Largest possible value.

    Returns:
        ``[B]`` float32; 1 for equal images.

    Raises:
        ValueError: Shapes are wrong or differ, or the image is smaller than the window.
    """
    left, right = _image_pair(a, b)
    if min(left.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {tuple(left.shape[-2:])}")
    # Variances are differences of squares: double keeps them from cancelling.
    left, right = left.double(), right.double()
    mean_left, mean_right = _blur(left), _blur(right)
    var_left = _blur(left * left) - mean_left.square()
    var_right = _blur(right * right) - mean_right.square()
    covariance = _blur(left * right) - mean_left * mean_right
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_left * mean_right + c1) / (mean_left.square() + mean_right.square() + c1)
    structure = (2 * covariance + c2) / (var_left + var_right + c2)
    return (luminance * structure).flatten(1).mean(dim=1).float()


def _blur(images: Tensor) -> Tensor:
    """Weighted mean over each window, ``[B, C, H - 10, W - 10]``."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - (WINDOW - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA**2))
    weights = weights / weights.sum()
    planes = images.flatten(0, 1).unsqueeze(1)
    planes = functional.conv2d(planes, weights.view(1, 1, WINDOW, 1))
    planes = functional.conv2d(planes, weights.view(1, 1, 1, WINDOW))
    return planes.view(*images.shape[:2], *planes.shape[-2:])


def _image_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"images must both be [B, C, H, W] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.float(), b.float()
