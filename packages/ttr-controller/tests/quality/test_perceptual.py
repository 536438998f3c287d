import numpy as np
import pytest
import torch
from ttr_controller.quality.perceptual import psnr, ssim


def pictures(seed, shape=(2, 3, 17, 23)):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(*shape[:2], 5, 6, generator=generator)
    picture = torch.nn.functional.interpolate(smooth, shape[2:], mode="bilinear")
    return (picture + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)


def ssim_by_loops(a, b):
    """The published formula window by window, in numpy."""
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for x, y in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                p, q = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                numerator = (2 * mean_p * mean_q + 0.01**2) * (2 * covariance + 0.03**2)
                values.append(numerator / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2)))
    return np.mean(values)


def test_ssim_equals_the_formula_window_by_window():
    a, b = pictures(0), (0.7 * pictures(0) + 0.3 * pictures(1)).clamp(0, 1)
    expected = [ssim_by_loops(a[i].double().numpy(), b[i].double().numpy()) for i in range(2)]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-5)
    assert 0.3 < expected[0] < 0.98


def test_ssim_of_equal_pictures_is_one_and_peak_is_a_unit():
    a, b = pictures(0), pictures(1)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    torch.testing.assert_close(ssim(255 * a, 255 * b, peak=255.0), ssim(a, b))


def test_psnr_per_item():
    a, b = pictures(0), pictures(1)
    expected = [10 * np.log10(1 / np.mean((a[i].numpy() - b[i].numpy()) ** 2)) for i in range(2)]
    np.testing.assert_allclose(psnr(a, b).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(psnr(255 * a, 255 * b, peak=255.0), psnr(a, b))
    assert torch.isinf(psnr(a, a)).all()


def test_wrong_pictures_are_named():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 10, 30), torch.zeros(1, 3, 10, 30))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        psnr(torch.zeros(3, 12, 12), torch.zeros(3, 12, 12))
