from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ttr_distill.tiny.pictures import read_icons, render, render_set

HALF = '<path fill="#ff8000" d="M0 0h64v128H0z"/>'
GLASS = '<path fill="#0000ff" fill-opacity="0.5" d="M0 0h128v128H0z"/>'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    icons = {"icons": {"half-square": {"body": HALF}, "glass": {"body": GLASS}}, "width": 128, "height": 128}
    (tmp_path / "icons.json").write_text(json.dumps(icons), encoding="utf-8")
    members = {"categories": {"Shapes": ["half-square", "glass", "gone"], "Other": []}}
    (tmp_path / "metadata.json").write_text(json.dumps(members), encoding="utf-8")
    return tmp_path


def test_read_icons(package: Path) -> None:
    documents = read_icons(package, ["Shapes"])
    assert list(documents) == ["glass", "half square"]
    assert 'viewBox="0 0 128 128"' in documents["glass"]


def test_errors(package: Path) -> None:
    with pytest.raises(ValueError, match=r"no category \['Animals'\]"):
        read_icons(package, ["Animals"])
    (package / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.json"):
        read_icons(package, ["Shapes"])


def test_render_multiplies_by_opacity(package: Path) -> None:
    pytest.importorskip("resvg_py")
    pictures = render_set(package, size=16, categories=["Shapes"])
    glass, half = pictures.pixels
    assert pictures.concepts == ("glass", "half square")
    assert half[3, 2].tolist() == [255, 128, 0, 255]
    assert half[3, 12].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(glass[8, 8], torch.tensor([0, 0, 128, 128], dtype=torch.uint8), rtol=0, atol=1)
    assert render(read_icons(package, ["Shapes"])["glass"], 20).shape == (20, 20, 4)
