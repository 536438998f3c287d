import pytest
from attn_dispatch import LayerKey, StepContext
from ttr_distill.training.steps import StepDraw

LAYERS = tuple(LayerKey("single", index) for index in range(4))


def drawn(draw: StepDraw, steps: int) -> list[tuple[frozenset[LayerKey], bool]]:
    found = []
    for step in range(steps):
        chosen = {draw.layers(layer, StepContext(1.0 / (1 + step))) for layer in LAYERS}
        assert len(chosen) == 1, "one draw serves all calls of a step"
        found.append((chosen.pop(), draw.heldout))
    return found


def test_numbers_of_layers_and_held_out_steps() -> None:
    draw = StepDraw(LAYERS, least=1, most=3, period=5, seed=0)
    found = drawn(draw, 200)
    assert {len(layers) for layers, _ in found} == {1, 2, 3}
    held = [n for n, (_, heldout) in enumerate(found) if heldout]
    assert [n // 5 for n in held] == list(range(1, 40)), "one of five, none of the first five"
    assert len({n % 5 for n in held}) == 5
    assert draw.number == len(found[-1][0])
    draw.begin_run()
    assert draw.number is None
    assert not any(heldout for _, heldout in drawn(StepDraw(LAYERS, least=1, most=3, period=0, seed=0), 50))


def test_seeds_differ_and_repeat_and_a_restored_draw_goes_on() -> None:
    make = [StepDraw(LAYERS, least=0, most=None, period=3, seed=seed) for seed in (1, 1, 2)]
    runs = [drawn(draw, 20) for draw in make]
    assert runs[0] == runs[1] != runs[2]
    other = StepDraw(LAYERS, least=0, most=None, period=3, seed=9)
    other.restore(make[0].tensors(), make[0].facts())
    for draw in (make[0], other):
        draw.begin_run()
    assert drawn(make[0], 20) == drawn(other, 20)
    with pytest.raises(ValueError, match="lacks the random stream 'heldout steps'"):
        other.restore({"layers": make[0].tensors()["layers"]}, make[0].facts())
