from __future__ import annotations

import pytest
import torch
from ttr_distill.tiny import TinyTeacher, load_teacher
from ttr_distill.tiny.data import PictureSet


@pytest.fixture(scope="session")
def teacher() -> TinyTeacher:
    return load_teacher()


@pytest.fixture(scope="session")
def shapes() -> PictureSet:
    """Six pictures of 64 pixels: discs and squares in three colours, transparent outside."""
    axis = torch.arange(64) - 31.5
    masks = {"disc": axis[:, None] ** 2 + axis**2 < 24**2, "square": (axis[:, None].abs() < 20) & (axis.abs() < 20)}
    paints = {"red": (220, 30, 30), "navy": (20, 30, 130), "lime": (120, 220, 40)}
    names, pixels = [], []
    for paint, colour in paints.items():
        for shape, mask in masks.items():
            names.append(f"{paint} {shape}")
            pixels.append(mask[..., None] * torch.tensor([*colour, 255], dtype=torch.uint8))
    return PictureSet(tuple(names), torch.stack(pixels))
