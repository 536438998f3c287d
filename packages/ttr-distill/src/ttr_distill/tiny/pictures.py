"""Read an icon set in Iconify's JSON format and render it (extra ``teacher``).

The set used for the embedded teacher is Noto Emoji, the npm package ``@iconify-json/noto``: a folder with
``icons.json`` (SVG bodies by name) and ``metadata.json`` (names by category).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ttr_distill.tiny.data import PictureSet

CATEGORIES = ("Animals & Nature", "Food & Drink")
"""The categories of Noto Emoji that the embedded teacher draws."""


def read_icons(package: Path, categories: Sequence[str] = CATEGORIES) -> dict[str, str]:
    """Read the SVG documents of some categories, by name as captions are written (``"red apple"``).

    Raises:
        FileNotFoundError: ``icons.json`` or ``metadata.json`` is missing.
        ValueError: A category does not exist.
    """
    for name in ("icons.json", "metadata.json"):
        if not (package / name).is_file():
            raise FileNotFoundError(f"{package} has no {name}; unpack the npm package @iconify-json/noto there")
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    members = json.loads((package / "metadata.json").read_text(encoding="utf-8"))["categories"]
    unknown = [category for category in categories if category not in members]
    if unknown:
        raise ValueError(f"no category {unknown} in {package}; there are {sorted(members)}")
    width, height = icons.get("width", 16), icons.get("height", 16)
    documents = {}
    for category in categories:
        for name in sorted(members[category]):
            icon = icons["icons"].get(name)
            if icon is None:
                continue
            box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
            documents[name.replace("-", " ")] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
                f"{icon['body']}</svg>"
            )
    return documents


def render(document: str, size: int) -> Tensor:
    """Render an SVG document to ``[size, size, 4]`` uint8, colours multiplied by opacity.

    Raises:
        ImportError: resvg-py or Pillow is not installed; the message names the extra.
    """
    try:
        import resvg_py
        from PIL import Image
    except ImportError as error:
        raise ImportError('rendering pictures needs: pip install "ttr-distill[teacher,diffusers]"') from error
    encoded = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(encoded))) as image:
        straight = np.asarray(image.convert("RGBA"), dtype=np.float32)
    opacity = straight[..., 3:] / 255
    return torch.from_numpy(np.rint(np.concatenate([straight[..., :3] * opacity, straight[..., 3:]], axis=-1))).byte()


def render_set(package: Path, *, size: int = 256, categories: Sequence[str] = CATEGORIES) -> PictureSet:
    """Render all icons of some categories.

    Args:
        package: Folder of the icon set.
        size: Width and height in pixels.
        categories: Which categories.

    Raises:
        FileNotFoundError: A file of the icon set is missing.
        ImportError: resvg-py is not installed.
        ValueError: A category does not exist.
    """
    documents = read_icons(package, categories)
    return PictureSet(tuple(documents), torch.stack([render(document, size) for document in documents.values()]))
