"""What ran, how long and how well, as a picture: one row per layer, one column per sampling step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from attn_dispatch.router import NATIVE
from torch import Tensor

from .measured import RunFigures
from .report_text import EXACT, layer_name

if TYPE_CHECKING:
    from PIL import ImageDraw

WIDTH = 1024
"""Width of the picture in pixels."""

_INK, _PAPER, _EMPTY = (38, 38, 38), (250, 250, 250), (230, 230, 230)
_GREY = (176, 176, 176)
_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189), (140, 86, 75), (227, 119, 194))
_COLD, _HOT = (255, 247, 220), (153, 0, 38)
_MARGIN, _LABEL, _LINE, _TALLEST = 16, 84, 16, 26


@dataclass(frozen=True)
class Panel:
    """One map.

    Attributes:
        title: Headline.
        layers: Labels of the rows.
        steps: Labels of the columns.
        colours: Colour of each cell by ``(row, column)``; a missing cell did not happen.
        legend: Colour and text of each entry.
    """

    title: str
    layers: tuple[str, ...]
    steps: tuple[str, ...]
    colours: Mapping[tuple[int, int], tuple[int, int, int]]
    legend: tuple[tuple[tuple[int, int, int], str], ...]


def panels(name: str, figures: RunFigures) -> list[Panel]:
    """Make the maps of one installation: what ran, milliseconds a call, and the error where it was measured."""
    rows = figures.report.rows()
    layers = list(dict.fromkeys(row.layer for row in rows))
    sigmas = list(dict.fromkeys(row.sigma for row in rows))
    place = {(layer, sigma): (y, x) for y, layer in enumerate(layers) for x, sigma in enumerate(sigmas)}
    labels = tuple(layer_name(layer) for layer in layers)
    steps = tuple("?" if sigma is None else f"{sigma:.3g}" for sigma in sigmas)
    ran: dict[tuple[int, int], tuple[int, str]] = {}
    times: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        cell = place[row.layer, row.sigma]
        ran[cell] = max(ran.get(cell, (0, "")), (row.count, row.ran))
        total = times.setdefault(cell, [0.0, 0.0])
        total[0] += row.milliseconds
        total[1] += row.count
    names = list(dict.fromkeys(who for _, who in ran.values()))
    others = [who for who in names if who != NATIVE]
    colour = {who: _COLOURS[index % len(_COLOURS)] for index, who in enumerate(others)} | {NATIVE: _GREY}
    legend = tuple((colour[who], EXACT if who == NATIVE else who) for who in names)
    answered = Panel(f"{name}: what ran", labels, steps, {cell: colour[who] for cell, (_, who) in ran.items()}, legend)
    spent = {cell: total / count for cell, (total, count) in times.items()}
    found = [answered, _scaled(f"{name}: milliseconds a call", labels, steps, spent, "ms")]
    errors = {place[one.layer, one.sigma]: one.relative_l2 for one in figures.errors if (one.layer, one.sigma) in place}
    if errors:
        found.append(_scaled(f"{name}: distance from exact attention (relative L2)", labels, steps, errors, ""))
    return found


def draw(found: Sequence[Panel], empty: str = "no sampling run yet") -> Tensor:
    """Draw maps below each other.

    Args:
        found: The maps; none = a picture that says ``empty``.
        empty: Text of an empty picture.

    Returns:
        ``[1, height, width, 3]`` float32 from 0 to 1, as images are in ComfyUI.
    """
    from PIL import Image, ImageDraw

    heights = [_height(panel) for panel in found]
    picture = Image.new("RGB", (WIDTH, max(64, sum(heights))), _PAPER)
    pen = ImageDraw.Draw(picture)
    if not found:
        pen.text((_MARGIN, 24), empty, fill=_INK)
    top = 0
    for panel, height in zip(found, heights, strict=True):
        _draw_panel(pen, panel, top)
        top += height
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, picture.height, picture.width, 3).float() / 255


def _scaled(
    title: str, layers: tuple[str, ...], steps: tuple[str, ...], values: Mapping[tuple[int, int], float], unit: str
) -> Panel:
    """Colour values from zero to the largest."""
    largest = max(values.values(), default=0.0)
    colours = {cell: _between(value / largest if largest > 0 else 0.0) for cell, value in values.items()}
    legend = tuple((_between(share), f"{share * largest:.3g} {unit}".strip()) for share in (0.0, 0.5, 1.0))
    return Panel(title, layers, steps, colours, legend)


def _between(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(cold + (hot - cold) * share) for cold, hot in zip(_COLD, _HOT, strict=True))
    return red, green, blue


def _cell_height(panel: Panel) -> int:
    return max(6, min(_TALLEST, 640 // max(1, len(panel.layers))))


def _height(panel: Panel) -> int:
    return _MARGIN + 3 * _LINE + len(panel.layers) * _cell_height(panel) + _LINE + _MARGIN


def _draw_panel(pen: "ImageDraw.ImageDraw", panel: Panel, top: int) -> None:
    left, tall = _MARGIN + _LABEL, _cell_height(panel)
    wide = (WIDTH - left - _MARGIN) / max(1, len(panel.steps))
    pen.text((_MARGIN, top + _MARGIN), panel.title, fill=_INK)
    x = left
    for colour, text in panel.legend:
        y = top + _MARGIN + _LINE + 4
        pen.rectangle((x, y, x + 10, y + 10), fill=colour)
        pen.text((x + 15, y - 1), text, fill=_INK)
        x += 30 + round(pen.textlength(text))
    body = top + _MARGIN + 3 * _LINE
    for row, label in enumerate(panel.layers):
        y = body + row * tall
        if row % max(1, -(-12 // tall)) == 0:
            pen.text((_MARGIN, y + tall / 2 - 6), label, fill=_INK)
        for column in range(len(panel.steps)):
            box = (left + column * wide, y, left + (column + 1) * wide - 1, y + tall - 1)
            pen.rectangle(box, fill=panel.colours.get((row, column), _EMPTY))
    _draw_steps(pen, panel, body + len(panel.layers) * tall + 2, wide)


def _draw_steps(pen: "ImageDraw.ImageDraw", panel: Panel, y: float, wide: float) -> None:
    left, free = _MARGIN + _LABEL, 0.0
    pen.text((_MARGIN, y), "sigma", fill=_INK)
    for column, label in enumerate(panel.steps):
        x = left + column * wide
        if x >= free:
            pen.text((x, y), label, fill=_INK)
            free = x + pen.textlength(label) + 6
