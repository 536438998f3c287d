import sys

import pytest
import torch
from ttr_controller.quality.latent import cosine_error, relative_rmse
from ttr_controller.quality.models import QualityError
from ttr_controller.quality.objective import QualityModels, QualityObjective, QualityTerm, QualityWeights
from ttr_controller.quality.perceptual import psnr, ssim


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
    with pytest.raises(ValueError, match="scorers must be finite"):
        QualityObjective(scorers={"a": -1.0})


def test_psnr_counts_as_the_error_that_it_measures():
    (student, drawn), (teacher, exact) = results(0), results(1)
    report = QualityObjective(QualityWeights(rmse_weight=0.0, psnr_weight=2.0))(student, teacher, drawn, exact)
    torch.testing.assert_close(report.error, 2.0 * 10 ** (-psnr(drawn, exact) / 20))


def test_a_missing_package_is_noticed_before_the_first_rollout_and_only_where_it_is_wanted(monkeypatch):
    packages = {"lpips": "lpips", "dreamsim": "dreamsim", "open_clip": "hps", "pyiqa": "biqa"}
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    QualityObjective()
    wanted = {
        "lpips_weight": "lpips",
        "dreamsim_weight": "dreamsim",
        "hps_weight": "open_clip",
        "biqa_quality_weight": "pyiqa",
        "biqa_aesthetic_weight": "pyiqa",
    }
    for weight, package in wanted.items():
        with pytest.raises(QualityError, match=rf"{package} is missing; install ttr-controller\[{packages[package]}\]"):
            QualityObjective(QualityWeights(**{weight: 0.5}))


def test_penalties_read_prompts_and_report_both_scores():
    objective = QualityObjective(QualityWeights(rmse_weight=0.0, retrieval_weight=0.5))
    assert objective.needs_prompts
    (student, drawn), (teacher, exact) = results(0), results(1)
    with pytest.raises(ValueError, match="give the objective the prompts"):
        objective(student, teacher, drawn, exact)
    report = objective(student, teacher, drawn, exact, ["red apple", "panda"])
    assert set(report.terms) == {"rmse", "retrieval_penalty", "retrieval_student", "retrieval_teacher"}
    expected = torch.relu(report.terms["retrieval_teacher"] - report.terms["retrieval_student"])
    torch.testing.assert_close(report.error, 0.5 * expected)


def test_networks_move_to_the_device_asked_for_and_are_put_away(pictures):
    pytest.importorskip("lpips")
    from ttr_controller.quality.learned import LpipsDistance

    distance = LpipsDistance("squeeze", random_backbone=True)
    objective = QualityObjective(extra={"smoke": QualityTerm(1.0, distance)}, models=QualityModels(offload=True))
    (student, _), (teacher, _) = results(0), results(1)
    assert distance.model.device is None, "loaded before it was needed"
    report = objective(student, teacher, pictures(noise=0.1), pictures())
    assert (report.terms["smoke"] > 0).all()
    assert not report.error.requires_grad
    assert distance.model.device == torch.device("cpu")
