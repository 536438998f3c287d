import pytest
import torch
from ttr_controller.quality.latent import cosine_error, relative_rmse
from ttr_controller.quality.objective import QualityObjective, QualityTerm, QualityWeights
from ttr_controller.quality.perceptual import ssim


def results(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 9, 4, generator=generator), torch.rand(2, 3, 12, 12, generator=generator)


def test_error_is_the_weighted_sum_of_its_terms():
    (student, drawn), (teacher, exact) = results(0), results(1)
    weights = QualityWeights(rmse_weight=0.5, cosine_weight=2.0, ssim_weight=0.25)
    brightness = QualityTerm(3.0, lambda a, b: (a.mean(dim=(1, 2, 3)) - b.mean(dim=(1, 2, 3))).abs())
    report = QualityObjective(weights, extra={"brightness": brightness})(student, teacher, drawn, exact)
    expected = (
        0.5 * relative_rmse(student, teacher)
        + 2.0 * cosine_error(student, teacher)
        + 0.25 * (1 - ssim(drawn, exact))
        + 3.0 * (drawn.mean(dim=(1, 2, 3)) - exact.mean(dim=(1, 2, 3))).abs()
    )
    torch.testing.assert_close(report.error, expected)
    assert set(report.terms) == {"rmse", "cosine_distance", "ssim_distance", "brightness"}


def test_default_is_the_relative_latent_error_and_reads_no_pictures():
    (student, _), (teacher, _) = results(0), results(1)
    report = QualityObjective()(student, teacher, torch.zeros(0), torch.zeros(0))
    torch.testing.assert_close(report.error, relative_rmse(student, teacher))


def test_weights_are_checked():
    with pytest.raises(ValueError, match="finite and >= 0"):
        QualityWeights(cosine_weight=-1.0)
    with pytest.raises(ValueError, match="nothing to judge"):
        QualityObjective(QualityWeights(rmse_weight=0.0))
