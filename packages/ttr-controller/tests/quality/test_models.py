import sys

import pytest
import torch
from torch import nn
from ttr_controller.quality.models import LazyModel, Penalty, QualityError, imported, release, require


def lazy(load):
    return LazyModel(load, what="the judge", remedy="place judge.pt in the drawer")


def test_a_network_is_loaded_once_and_only_when_asked_for():
    loads = []

    def load():
        loads.append(1)
        return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))

    model = lazy(load)
    assert loads == []
    assert model.device is None
    with torch.inference_mode():
        network = model.on("cpu")
    assert model.on("cpu") is network
    assert loads == [1]
    assert not network.training
    assert not any(parameter.requires_grad or parameter.is_inference() for parameter in network.parameters())


def test_a_network_follows_its_images_and_can_be_put_away():
    """The meta device stands for another one: moving there and back shows in the parameters."""
    model = lazy(lambda: nn.Linear(2, 2))
    assert model.on("meta").weight.device.type == "meta"
    assert model.device == torch.device("meta")
    model = lazy(lambda: nn.Linear(2, 2))
    model.offload()
    assert model.device is None
    model.on("cpu")
    scorer = type("Scorer", (), {"model": model})()
    release(scorer, object())
    assert model.device == torch.device("cpu")


def test_what_cannot_be_loaded_says_what_to_do():
    def fail():
        raise OSError("no\n route")

    with pytest.raises(QualityError) as error:
        lazy(fail).on("cpu")
    assert str(error.value) == "the judge cannot be loaded (no route); place judge.pt in the drawer"


def test_a_missing_package_names_the_extra(monkeypatch):
    with pytest.raises(QualityError, match=r"no_such_judge is missing; install ttr-controller\[lpips\]"):
        require("no_such_judge", "lpips")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(QualityError, match=r"lpips is missing"):
        imported("lpips", "lpips")
    assert imported("torch", "lpips") is torch


class Brightness:
    """Scores an image by its mean, and counts what it is asked."""

    needs_prompts = True

    def __init__(self):
        self.asked = []

    def __call__(self, images, prompts):
        self.asked += list(prompts)
        return images.mean(dim=(1, 2, 3))


def flat(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4)


def test_only_a_lower_score_is_penalised():
    penalty, mine, theirs = Penalty(Brightness())(flat(0.25, 0.75), flat(0.5, 0.5), ["a", "b"])
    torch.testing.assert_close(penalty, torch.tensor([0.25, 0.0]))
    torch.testing.assert_close(mine, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(theirs, torch.tensor([0.5, 0.5]))


def test_an_image_of_the_teacher_is_scored_once_per_prompt():
    scorer = Brightness()
    penalty = Penalty(scorer, capacity=2)
    for _ in range(3):
        penalty(flat(0.1), flat(0.5), ["a"])
    assert scorer.asked == ["a"] * 4  # the student every time, the teacher once
    penalty(flat(0.1), flat(0.5), ["b"])
    assert scorer.asked.count("b") == 2
    theirs = penalty(flat(0.1, 0.1), flat(0.75, 0.5), ["c", "b"])[2]
    torch.testing.assert_close(theirs, torch.tensor([0.75, 0.5]))
    assert scorer.asked.count("b") == 3
    scorer.asked.clear()
    penalty(flat(0.1), flat(0.5), ["a"])
    assert scorer.asked == ["a", "a"], "the least recently used score was kept beyond the capacity"
