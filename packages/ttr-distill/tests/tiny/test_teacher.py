from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from ttr_distill.tiny import TinyTeacher, initial_noise, load_teacher
from ttr_distill.tiny.data import load_thumbnails
from ttr_distill.tiny.teacher import WEIGHTS, position_ids


def test_is_a_genuine_flux_transformer(teacher: TinyTeacher) -> None:
    from diffusers import FluxTransformer2DModel

    assert type(teacher.transformer) is FluxTransformer2DModel
    weights = list(teacher.transformer.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert not any(weight.requires_grad for weight in weights)
    assert not teacher.transformer.training


def test_encoding(teacher: TinyTeacher) -> None:
    tokens, pooled = teacher.encode(["red apple on blue", "", "panda"])
    assert tokens.shape == (3, 12, 64)
    assert pooled.shape == (3, 64)
    assert not torch.equal(pooled[0], pooled[2])


def test_caption_and_picture_belong_together(teacher: TinyTeacher) -> None:
    """The velocity error of a noised picture is much larger with another caption, and larger without one."""
    pictures = load_thumbnails()
    names = ["red apple", "panda", "broccoli", "hamburger"]
    index = torch.tensor([pictures.concepts.index(name) for name in names])
    images = torch.nn.functional.interpolate(pictures.on(index, torch.ones(4, 3)), size=(64, 64), mode="bilinear")
    clean, noise = teacher.encode_images(images), initial_noise(range(4), 16, 16)

    def error(captions: list[str]) -> float:
        with torch.inference_mode():
            noisy = 0.15 * clean + 0.85 * noise
            velocity = teacher.velocity(noisy, 0.85, teacher.encode(captions), 16, 16)
        return float((velocity - (noise - clean)).square().mean())

    right, none, wrong = error(names), error([""] * 4), error(names[1:] + names[:1])
    assert right < 0.9 * none
    assert right < 0.5 * wrong


def test_positions_span_the_same_canvas_at_every_size() -> None:
    assert torch.equal(position_ids(16, 16)[17], torch.tensor([0.0, 1.5, 1.5]))
    large = position_ids(4, 8)
    assert large.shape == (32, 3)
    assert torch.equal(large[-1], torch.tensor([0.0, 14.0, 15.0]))
    assert torch.equal(large.mean(dim=0), torch.tensor([0.0, 8.0, 8.0]))


def test_wrong_shapes_are_named(teacher: TinyTeacher) -> None:
    encoding = teacher.encode(["panda"])
    with pytest.raises(ValueError, match=r"\[B, 16, 16\], got \(1, 12, 16\)"):
        teacher.velocity(torch.zeros(1, 12, 16), 0.5, encoding, 4, 4)
    with pytest.raises(ValueError, match="1 captions for 2 latents"):
        teacher.velocity(torch.zeros(2, 16, 16), 0.5, encoding, 4, 4)


def test_fingerprint_follows_the_weights(teacher: TinyTeacher, tmp_path: Path) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(WEIGHTS, copy)
    assert load_teacher(directory=copy).fingerprint == teacher.fingerprint
    file = copy / "transformer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert load_teacher(directory=copy).fingerprint != teacher.fingerprint
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks transformer\.safetensors"):
        load_teacher(directory=copy)


def test_missing_diffusers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "ttr-distill\[diffusers\]"'):
        load_teacher()


def test_weights_stay_small_and_carry_their_licence() -> None:
    files = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert sum(files.values()) < 15e6
    assert files["thumbnails.safetensors"] < 310_000
    assert {"LICENSE", "NOTICE", "MODEL_CARD.md"} <= set(files)
