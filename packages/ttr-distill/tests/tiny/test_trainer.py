from __future__ import annotations

import torch
from ttr_distill.tiny.data import PictureSet
from ttr_distill.tiny.teacher import build_transformer
from ttr_distill.tiny.trainer import ARCHITECTURE, Stage, TrainConfig, Trainer, split_parameters, start_as_identity


def make(shapes: PictureSet, **options: float) -> Trainer:
    return Trainer(shapes, TrainConfig(stages=(Stage(((4, 16),), 1.0),), **options))  # type: ignore[arg-type]


def test_every_weight_is_trained_once(shapes: PictureSet) -> None:
    model = make(shapes).model
    matrices, rest = split_parameters(model)
    assert {weight.ndim for weight in matrices} == {2}
    assert sorted(map(id, matrices + rest)) == sorted(map(id, model.parameters()))
    assert sum(w.numel() for w in matrices) > 0.9 * sum(p.numel() for p in model.parameters())


def test_starts_with_zero_output_and_open_gates() -> None:
    transformer = build_transformer(ARCHITECTURE)
    start_as_identity(transformer, gate=0.25)
    weights = dict(transformer.named_parameters())
    assert not weights["proj_out.weight"].any()
    for name in ("norm1", "norm1_context"):
        bias = weights[f"transformer_blocks.0.{name}.linear.bias"].reshape(6, 128)
        assert bias[:, 0].tolist() == [0, 0, 0.25, 0, 0, 0.25]
    assert weights["single_transformer_blocks.3.norm.linear.bias"].reshape(3, 128)[:, 5].tolist() == [0, 0, 0.25]
    changed = [
        name for name, weight in weights.items() if "norm" in name and name.endswith("linear.weight") and weight.any()
    ]
    assert not changed


def test_captions_and_pictures_agree(shapes: PictureSet) -> None:
    trainer = make(shapes, caption_dropout=0.0)
    batch = trainer.draw(4, 64, torch.Generator().manual_seed(0))
    words = trainer.vocabulary.words
    images = trainer.codec.decode(batch.latent, 4, 4)
    for row, image in zip(batch.ids.tolist(), images, strict=True):
        caption = [words[number] for number in row if number > 2]
        corner = image[:, :2, :2].mean(dim=(1, 2))
        colour = caption[caption.index("on") + 1] if "on" in caption else "white"
        torch.testing.assert_close(corner, torch.tensor(trainer.vocabulary.colours[colour]), rtol=0, atol=0.12)
        centre = image[:, 7:9, 7:9].mean(dim=(1, 2))
        assert int(centre.argmax()) == {"red": 0, "lime": 1, "navy": 2}[caption[0]]


def test_dropped_captions_are_the_null_caption(shapes: PictureSet) -> None:
    ids = make(shapes, caption_dropout=0.3).draw(4, 400, torch.Generator().manual_seed(0)).ids
    share = float((ids[:, 0] == 2).float().mean())
    assert 0.2 < share < 0.4


def test_average_follows_and_validation_leaves_the_weights_alone(shapes: PictureSet) -> None:
    trainer = make(shapes)
    name, weight = "transformer.x_embedder.weight", trainer.transformer.get_parameter("x_embedder.weight")
    start = weight.detach().clone()
    for _ in range(2):
        trainer.step(4, 16, 1.0, 0.5)
    moved = weight.detach().clone()
    assert 0 < (trainer.average[name] - start).norm() < (moved - start).norm()
    first = trainer.validation_loss(4)
    assert torch.equal(weight, moved)
    assert first == trainer.validation_loss(4)
