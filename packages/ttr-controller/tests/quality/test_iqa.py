import sys

import pytest
import torch
from ttr_controller.quality.iqa import IqaDistance, IqaScorer, iqa_penalties, iqa_scorer
from ttr_controller.quality.models import QualityError
from ttr_controller.quality.perceptual import ssim


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    for make in (lambda: IqaScorer("piqe"), lambda: IqaDistance("ssim"), lambda: iqa_penalties(0.0, 1.0)):
        with pytest.raises(QualityError, match=r"pyiqa is missing; install ttr-controller\[biqa\]"):
            make()
    assert iqa_penalties(0.0, 0.0) == {}


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"one of liqe_mix\+nima, qrealign-mini.*got 'qalign'"):
        iqa_scorer("quality", "qalign")


def test_each_aspect_has_its_metric():
    pytest.importorskip("pyiqa")
    named = iqa_penalties(1.0, 1.0)
    assert {name: penalty.scorer.metric for name, penalty in named.items()} == {
        "biqa_quality": "liqe_mix",
        "biqa_aesthetic": "nima",
    }
    large = iqa_penalties(1.0, 1.0, "qrealign-mini")
    quality, aesthetic = large["biqa_quality"].scorer, large["biqa_aesthetic"].scorer
    assert quality.metric == aesthetic.metric == "qrealign-mini"
    assert quality.model is aesthetic.model
    assert set(iqa_penalties(0.0, 2.0)) == {"biqa_aesthetic"}


def test_piqe_of_the_real_library_sees_noise(pictures):
    """Lower is better in the library, higher in a scorer."""
    pyiqa = pytest.importorskip("pyiqa")
    scorer = IqaScorer("piqe")
    big = (2, 3, 128, 128)
    sharp, noisy = pictures(shape=big, noise=0.05), pictures(shape=big, noise=0.5)
    assert (scorer(sharp) > scorer(noisy)).all()
    direct = pyiqa.create_metric("piqe", device=torch.device("cpu"))
    assert direct.lower_better
    torch.testing.assert_close(scorer(sharp)[0], -direct(sharp[:1]).flatten()[0])


def test_ssim_and_ms_ssim_of_the_real_library_are_distances(pictures):
    pytest.importorskip("pyiqa")
    big = (2, 3, 192, 192)
    teacher = pictures(shape=big)
    for metric in ("ssim", "ms_ssim"):
        distance = IqaDistance(metric)
        torch.testing.assert_close(distance(teacher, teacher), torch.zeros(2), atol=1e-5, rtol=0)
        near, far = (distance(pictures(shape=big, noise=noise), teacher) for noise in (0.02, 0.2))
        assert (near < far).all()
    grey = pictures(shape=big, noise=0.1).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    other = teacher.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    mine = 1 - ssim(grey, other)
    torch.testing.assert_close(IqaDistance("ssim")(grey, other).float(), mine, atol=0.02, rtol=0.05)


def test_missing_weights_and_unknown_metrics_are_one_sentence(hub, pictures):
    pytest.importorskip("pyiqa")
    with pytest.raises(QualityError, match=r"metric liqe_mix cannot be loaded .*downloaded once; without one copy"):
        IqaScorer("liqe_mix")(pictures())
    with pytest.raises(QualityError, match="pyiqa has no metric 'beauty'"):
        IqaScorer("beauty")(pictures())
