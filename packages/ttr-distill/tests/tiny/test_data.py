from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ttr_distill.tiny import heldout_prompts, retrieval_accuracy, retrieve, training_prompts
from ttr_distill.tiny.data import COLOURS, PictureSet, load_thumbnails, load_vocabulary


def paint(prompts: list[str], size: int) -> torch.Tensor:
    """Lay the shipped thumbnails on the prompts' backgrounds, enlarged."""
    pictures, vocabulary = load_thumbnails(), load_vocabulary()
    parsed = [vocabulary.parse(prompt) for prompt in prompts]
    index = torch.tensor([pictures.concepts.index(concept) for concept, _ in parsed])
    images = pictures.on(index, torch.tensor([vocabulary.colours[colour] for _, colour in parsed]))
    return torch.nn.functional.interpolate(images, size=(size, size), mode="nearest")


def test_prompt_sets_are_disjoint_and_drawable() -> None:
    vocabulary = load_vocabulary()
    sets = []
    for prompts in (training_prompts(), heldout_prompts()):
        concepts = [vocabulary.parse(prompt)[0] for prompt in prompts]
        assert len(prompts) >= 12
        assert len(set(concepts)) == len(concepts)
        assert set(concepts) <= set(vocabulary.concepts)
        assert len({vocabulary.parse(prompt)[1] for prompt in prompts}) >= 4
        vocabulary.ids(prompts)
        sets.append(set(concepts))
    assert not sets[0] & sets[1]


def test_thumbnails_match_the_vocabulary() -> None:
    assert load_thumbnails().concepts == load_vocabulary().concepts
    assert dict(load_vocabulary().colours) == dict(COLOURS)


@pytest.mark.parametrize("size", [16, 64, 100])
def test_retrieval_finds_true_pictures(size: int) -> None:
    prompts = [*training_prompts(), *heldout_prompts()]
    assert retrieval_accuracy(paint(prompts, size), prompts) == 1.0


def test_retrieval_can_fail() -> None:
    prompts = list(heldout_prompts())
    images = paint(prompts, 32)
    assert retrieval_accuracy(images.roll(1, dims=0), prompts) < 0.1
    assert retrieval_accuracy(torch.rand(images.shape, generator=torch.Generator().manual_seed(0)), prompts) < 0.2
    one_wrong = images.clone()
    one_wrong[0] = images[1]
    assert retrieval_accuracy(one_wrong, prompts) == pytest.approx(1 - 1 / len(prompts))


def test_retrieval_uses_the_background_of_the_prompt() -> None:
    images = paint(["penguin on black"], 64)
    assert retrieve(images, ["penguin on black"]) == ["penguin"]
    assert retrieve(images, ["penguin"]) != ["penguin"]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, h, w\]"):
        retrieve(torch.zeros(1, 3, 16, 16), ["panda", "bear"])
    with pytest.raises(ValueError, match="at least one"):
        retrieval_accuracy(torch.zeros(0, 3, 16, 16), [])
    with pytest.raises(ValueError, match="uint8"):
        PictureSet(("a",), torch.zeros(1, 4, 4, 4))


def test_picture_set_round_trip_and_averages(shapes: PictureSet, tmp_path: Path) -> None:
    path = tmp_path / "pictures.safetensors"
    path.write_bytes(shapes.dumps())
    loaded = PictureSet.load(path)
    assert loaded.concepts == shapes.concepts
    assert torch.equal(loaded.pixels, shapes.pixels)
    index, colour = torch.arange(6), torch.tensor([[0.2, 0.9, 0.4]]).expand(6, 3)
    small_after = torch.nn.functional.avg_pool2d(shapes.on(index, colour), 4)
    torch.testing.assert_close(shapes.resized(16).on(index, colour), small_after, rtol=0, atol=0.01)
