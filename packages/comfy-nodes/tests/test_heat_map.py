import pytest
import torch
from attn_dispatch import AttentionCall, DispatchReport, FidelityRow, LayerKey, StepContext
from comfy_nodes.heat_map import WIDTH, draw, panels
from comfy_nodes.measured import RunFigures

GREY = (176, 176, 176)
COLD, HOT = (255, 247, 220), (153, 0, 38)


def _figures(layers: int = 2, steps: int = 3, errors: bool = True) -> RunFigures:
    report, found = DispatchReport(), []
    for index in range(layers):
        for step in range(steps):
            layer, sigma = LayerKey("double", index), 1.0 - step / steps
            call = AttentionCall(*(torch.empty(0),) * 3, layer=layer, step=StepContext(sigma))
            report.record(call, "near_far" if step else "native", 1.0 + step)
            found.append(FidelityRow(layer, sigma, 1, 0, 0.0, 0.1 * step, 0.0, 0.1 * step))
    return RunFigures(report, tuple(found) if errors else ())


def test_cells_are_layers_and_steps() -> None:
    ran, times, errors = panels("approximate", _figures())
    assert ran.layers == ("double:0", "double:1")
    assert ran.steps == ("1", "0.667", "0.333")
    assert set(ran.colours) == {(y, x) for y in range(2) for x in range(3)}
    assert {ran.colours[y, 0] for y in range(2)} == {GREY}
    assert len({ran.colours[y, x] for y in range(2) for x in (1, 2)}) == 1
    assert {text: colour for colour, text in ran.legend}["exact"] == GREY
    assert times.colours[0, 2] == errors.colours[0, 2] == HOT
    assert errors.colours[0, 0] == COLD
    assert times.colours[0, 0] not in (COLD, HOT)
    assert [text for _, text in times.legend] == ["0 ms", "1.5 ms", "3 ms"]


def test_what_answered_most_calls_of_a_cell_shows() -> None:
    report = DispatchReport()
    call = AttentionCall(*(torch.empty(0),) * 3, layer=LayerKey("double", 0), step=StepContext(0.5))
    for ran in ("native", "near_far", "near_far"):
        report.record(call, ran, 4.0)
    ran, times = panels("approximate", RunFigures(report))
    assert [text for _, text in ran.legend] == ["near_far"]
    assert times.legend[2][1] == "4 ms"


@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (57, 20), (200, 100)])
def test_the_picture_is_an_image(layers: int, steps: int) -> None:
    found = panels("approximate", _figures(layers, steps))
    image = draw(found)
    assert image.shape[0] == 1
    assert image.shape[2:] == (WIDTH, 3)
    assert 0.0 <= float(image.min()) < float(image.max()) <= 1.0
    red, green, blue = (image[0] * 255).round().long().unbind(-1)
    pixels = set((red * 65536 + green * 256 + blue).unique().tolist())
    colours = {colour for panel in found for colour in panel.colours.values()}
    assert {red * 65536 + green * 256 + blue for red, green, blue in colours} <= pixels


def test_without_figures_the_picture_says_so() -> None:
    image = draw([], "no sampling run yet")
    assert image.shape == (1, 64, WIDTH, 3)
    assert float(image.min()) < 0.5  # there is ink
