"""Matplotlib figures as inline SVG that follow the page's colours in light and dark.

Figures are drawn in placeholder colours; on the way out each placeholder becomes a CSS variable of the page, so that
one drawing serves both schemes and print. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, CARD = "#fe0001", "#fe0002", "#fe0003", "#fe0004"
POLICY, PROBE, FIRST, LAST, RANDOM = "#fe0011", "#fe0012", "#fe0013", "#fe0014", "#fe0015"
GOOD, LIMIT = "#fe0021", "#fe0022"
_VARIABLES = (
    (INK, "ink"),
    (MUTED, "muted"),
    (GRID, "grid"),
    (CARD, "card"),
    (POLICY, "policy"),
    (PROBE, "probe"),
    (FIRST, "first"),
    (LAST, "last"),
    (RANDOM, "random"),
    (GOOD, "good"),
    (LIMIT, "limit"),
)
SERIES = (FIRST, POLICY, PROBE, LAST, INK, RANDOM)
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P")
WIDTH = 520.0
"""Width of a figure in its own units; text of 14 units is 14 CSS pixels when shown at this width."""

_RAMP = ((0, 34, 78), (66, 78, 107), (125, 124, 120), (188, 175, 111), (254, 232, 56))


def shade(share: float) -> tuple[str, str]:
    """Colours of a heat map cell, the same in light, dark and print: dark blue (0) to yellow (1).

    Args:
        share: 0 to 1.

    Returns:
        Background and a text colour that has a contrast of at least 4.5 to it, as CSS colours.
    """
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    part = position - index
    pairs = zip(_RAMP[index], _RAMP[index + 1], strict=True)
    red, green, blue = (round(low + part * (high - low)) for low, high in pairs)
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red / 255, green / 255, blue / 255)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if luminance < 0.179 else "#000000"


@contextmanager
def plotting() -> Iterator[None]:
    """Draw with the page's style, whatever style the process uses."""
    from matplotlib import style

    settings: dict[str, object] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 14,
        "axes.labelsize": 14,
        "axes.titlesize": 14,
        "xtick.labelsize": 13,
        "ytick.labelsize": 13,
        "legend.fontsize": 13,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 1,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 1,
        "lines.linewidth": 2,
        "lines.markersize": 8,
        "legend.frameon": False,
        "legend.handlelength": 2.6,
        "axes.unicode_minus": True,
    }
    with style.context(["default", settings]):
        yield


def new_figure(height: float) -> Figure:
    """Make an empty figure of the page's width, ``height`` in its units (call inside ``plotting``)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """Write a figure as one ``<svg>`` element for an HTML page.

    Args:
        figure: The figure.
        name: Prefix of its ids, unique on the page.
        label: What it shows, for readers who cannot see it.

    Returns:
        The element: scalable, no namespace, no metadata, only ids that are used.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]*)"', text)
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(label)}" class="plot">'
    text = re.sub(r"^<svg[^>]*>", lambda _: head, text)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', lambda match: f"{match[1]}#{name}-", text)
    text = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;\"]*", _font, text)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    for colour, variable in _VARIABLES:
        text = text.replace(colour, f"var(--{variable})")
    return Markup(re.sub(r"\n\s*", "\n", text).strip())


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}"
