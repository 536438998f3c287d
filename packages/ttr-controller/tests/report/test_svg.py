import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ttr_controller.report import load_results, plots, svg


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("share", [step / 40 for step in range(41)])
def test_heat_map_text_can_be_read(share: float) -> None:
    assert contrast(*svg.shade(share)) >= 4.5


def test_heat_map_grows_lighter() -> None:
    steps = [luminance(svg.shade(step / 20)[0]) for step in range(21)]
    assert steps == sorted(steps)


def schemes() -> list[dict[str, str]]:
    css = (Path(svg.__file__).parent / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (light, dark)]


def test_both_schemes_have_the_same_colours_and_enough_contrast() -> None:
    light, dark = schemes()
    assert light.keys() == dark.keys()
    assert light["page"] != dark["page"]
    for scheme in (light, dark):
        for name in ("ink", "muted", "accent", "good", "bad"):
            for ground in ("page", "card", "soft", "warm"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        for name in ("policy", "probe", "first", "last", "random", "limit"):
            assert contrast(scheme[name], scheme["card"]) >= 3, name


def test_an_svg_stands_alone_in_a_page(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    pareto = load_results(make_run(data)).pareto
    assert pareto is not None
    text = str(plots.pareto_plot(pareto))
    root = ET.fromstring(text)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert "latent error over attention cost" in str(root.get("aria-label"))
    assert "http" not in text
    assert "#fe00" not in text
    assert "DejaVu" not in text
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used == set(re.findall(r' id="([^"]+)"', text))
    assert used
    assert all(name.startswith("pareto-") for name in used)
    known = set(schemes()[0])
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= known


def marker_places(text: str, variable: str) -> list[tuple[float, float]]:
    """Centres of the markers drawn in one colour, as numbers of the drawing."""
    uses = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--(\w+)\)', text)
    return [(float(x), float(y)) for x, y, name in uses if name == variable]


def test_the_pareto_plot_puts_points_where_the_data_are(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    data["pareto"]["points"][-2]["cost"] = 0.6
    pareto = load_results(make_run(data)).pareto
    assert pareto is not None
    text = str(plots.pareto_plot(pareto))
    points = [point for point in data["pareto"]["points"] if point["method"] == "policy"]
    (x0, y0), (x1, y1), (x2, y2) = marker_places(text, "policy")[:3]
    (c0, e0), (c1, e1), (c2, e2) = [(point["cost"], point["latent_rmse"]) for point in points]
    assert (x1 - x0) / (x2 - x0) == pytest.approx((c1 - c0) / (c2 - c0), abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx((e1 - e0) / (e2 - e0), abs=1e-3)
    # Pixel rows grow downwards: a lower error is drawn lower.
    assert y0 < y1 < y2
    assert e0 > e1 > e2


def test_names_with_dollars_and_tags_are_drawn_as_they_are(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    data["pareto"]["points"][-1]["method"] = "a $x^2$ <b>"
    pareto = load_results(make_run(data)).pareto
    assert pareto is not None
    assert ">a $x^2$ &lt;b&gt;</text>" in str(plots.pareto_plot(pareto))


def test_the_break_even_point_is_marked_only_where_there_is_one(
    data: dict[str, Any], make_run: Callable[..., Path]
) -> None:
    timing = load_results(make_run(data)).timing
    assert timing is not None
    assert "near-far: 940" in str(plots.timing_plot(timing, "step"))
    for row in data["timing"]["rows"]:
        if row["variant"] != "exact":
            row["step_ms"] *= 5
    timing = load_results(make_run(data)).timing
    assert timing is not None
    text = str(plots.timing_plot(timing, "step"))
    assert "near-far: " not in text
    assert "no break-even point" in text


def test_a_negative_loss_is_drawn(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    distillation = load_results(make_run(data)).distillation
    assert distillation is not None
    assert "log scale" in str(plots.training_plot(distillation.curves, "loss"))
    for curve in data["distillation"]["curves"]:
        curve["loss"] = [value - 0.5 for value in curve["loss"]]
    distillation = load_results(make_run(data)).distillation
    assert distillation is not None
    text = str(plots.training_plot(distillation.curves, "loss"))
    assert "log scale" not in text
    assert "single:3" in text


def test_plotting_leaves_the_process_style_alone(data: dict[str, Any], make_run: Callable[..., Path]) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    fidelity = load_results(make_run(data)).fidelity
    assert fidelity is not None
    with mpl.rc_context({"font.size": 31, "lines.linewidth": 9}):
        other = str(plots.fidelity_plot(fidelity))
    assert dict(mpl.rcParams) == before
    assert other == str(plots.fidelity_plot(fidelity))
