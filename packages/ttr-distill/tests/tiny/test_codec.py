from __future__ import annotations

import pytest
import torch
from ttr_distill.tiny import TinyTeacher
from ttr_distill.tiny.codec import PatchCodec
from ttr_distill.tiny.data import COLOURS, PictureSet, load_thumbnails


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


def test_shipped_codec_keeps_pictures(teacher: TinyTeacher) -> None:
    small = load_thumbnails()
    index = torch.arange(len(small.concepts))
    images = small.on(index, torch.tensor(COLOURS["pink"]).expand(len(index), 3))
    smooth = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear").clamp(0, 1)
    latent = teacher.encode_images(smooth)
    assert latent.shape == (len(index), 256, 16)
    assert psnr(teacher.decode(latent, 16, 16), smooth) > 38
    assert 0.5 < float(latent.std()) < 1.5


def test_all_channels_are_lossless() -> None:
    images = torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    codec = PatchCodec.fit(images, channels=48)
    restored = codec.decode(codec.encode(images), 4, 6)
    assert psnr(restored, images) > 80


def test_fit_keeps_the_largest_components(shapes: PictureSet) -> None:
    index = torch.arange(6).repeat(4)
    colours = torch.rand(24, 3, generator=torch.Generator().manual_seed(1))
    images = shapes.on(index, colours)
    quality = [
        psnr(c.decode(c.encode(images), 16, 16), images) for c in (PatchCodec.fit(images, n) for n in (3, 8, 16))
    ]
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 29
    latent = PatchCodec.fit(images).encode(images)
    assert float(latent.var()) == pytest.approx(1.0, abs=0.02)


def test_tokens_are_in_raster_order(teacher: TinyTeacher) -> None:
    images = torch.zeros(1, 3, 8, 12)
    images[:, :, 4:, 4:8] = 1.0
    latent = teacher.encode_images(images)[0]
    different = [n for n in range(6) if not torch.allclose(latent[n], latent[0])]
    assert different == [4]


def test_wrong_shapes_are_named(teacher: TinyTeacher) -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 10, 8\)"):
        teacher.encode_images(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"\[B, 12, 16\], got \(1, 10, 16\)"):
        teacher.decode(torch.zeros(1, 10, 16), 3, 4)
    with pytest.raises(ValueError, match="basis"):
        PatchCodec(torch.zeros(48), torch.zeros(48, 8), torch.zeros(16))
