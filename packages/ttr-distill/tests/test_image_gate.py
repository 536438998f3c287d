import math
from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionHandler, LayerKey
from torch import Tensor
from ttr_distill.image_gate import ImageGate, gate_on_images, image_error, students_of
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker, ReadyGuard

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYERS = tuple(LayerKey("single", index) for index in range(6))


@pytest.fixture
def bank() -> StudentBank:
    """Students of which each answers worse than the one before: far tiles weigh more and more."""
    bank = StudentBank.for_layers(preset("near_far", tile=3, top_k=1), LAYERS, 2, 16, seed=0)
    with torch.no_grad():
        for layer in LAYERS:
            bank[layer].get_parameter("bias").fill_(0.4 * layer.index)
    return bank


class Host:
    """Draws two images by adding up what the layers answer; counts how often it is asked."""

    def __init__(self, make_call: CallMaker, native: Native) -> None:
        self._calls = [make_call(7, layer=layer, batch=2) for layer in LAYERS]
        self._native = native
        self.answers: list[int] = []

    def __call__(self, handler: AttentionHandler | None) -> Tensor:
        latent = torch.zeros(())
        own = 0
        for call in self._calls:
            exact = self._native(call)
            answer = exact if handler is None else handler(call, self._native)
            own += not torch.equal(answer, exact)
            latent = latent + answer
        self.answers.append(own)
        return latent


@pytest.fixture
def host(make_call: CallMaker, native: Native) -> Host:
    return Host(make_call, native)


def measured(limit: float | None, distances: dict[LayerKey, float]) -> ReadinessTracker:
    tracker = ReadinessTracker(ReadinessConfig(minimum_updates=0, image_limit=limit))
    for layer, distance in distances.items():
        tracker.observe(layer, distance, math.sqrt(2 * distance))
    tracker.flush()
    return tracker


def close(count: int) -> dict[LayerKey, float]:
    return {layer: 0.0001 * (layer.index + 1) for layer in LAYERS[:count]}


def error_of(bank: StudentBank, host: Host, count: int) -> float:
    return image_error(host(students_of(bank, LAYERS[:count])), host(None))


def test_students_serve_if_the_image_with_all_of_them_is_near_enough(bank: StudentBank, host: Host) -> None:
    whole = error_of(bank, host, 6)
    readiness = measured(whole * 1.01, close(6))
    assert not any(readiness.ready(layer) for layer in LAYERS), "nothing serves before an image was measured"
    host.answers.clear()
    found = gate_on_images(bank, readiness, host)
    assert host.answers == [0, 6]
    assert found == {layer: pytest.approx(whole) for layer in LAYERS}
    assert all(readiness.ready(layer) for layer in LAYERS)


@pytest.mark.parametrize("kept", range(6))
def test_the_largest_group_of_the_closest_students_is_found(bank: StudentBank, host: Host, kept: int) -> None:
    errors = [error_of(bank, host, count) for count in range(7)]
    assert errors == sorted(errors)
    readiness = measured((errors[kept] + errors[kept + 1]) / 2, close(6))
    host.answers.clear()
    found = gate_on_images(bank, readiness, host)
    assert [readiness.ready(layer) for layer in LAYERS] == [True] * kept + [False] * (6 - kept)
    assert len(host.answers) <= 5, "by bisection"
    assert {found[layer] for layer in LAYERS[:kept]} <= {errors[kept]}
    assert found[LAYERS[kept]] == errors[kept + 1], "the smallest group with it that was too far"


def test_who_is_not_ready_by_distance_is_neither_drawn_with_nor_let_through(bank: StudentBank, host: Host) -> None:
    readiness = measured(10.0, close(3) | {LAYERS[3]: 0.5})
    found = gate_on_images(bank, readiness, host)
    assert host.answers == [0, 3]
    assert set(found) == set(LAYERS[:3])
    assert [readiness.ready(layer) for layer in LAYERS] == [True] * 3 + [False] * 3
    assert gate_on_images(bank, measured(1.0, {}), host) == {}


def test_the_guard_says_what_the_images_said(bank: StudentBank, host: Host, make_call: CallMaker) -> None:
    limit = error_of(bank, host, 2) * 1.01
    readiness = measured(limit, close(6))
    guard = ReadyGuard(readiness)
    call = make_call(0, layer=LAYERS[5])
    assert guard(call) == "no image drawn with the student of this layer was measured"
    gate_on_images(bank, readiness, host)
    assert guard(call) == "an image drawn with the student of this layer was too far from the exact one"
    assert guard(make_call(0, layer=LAYERS[0])) is None


def test_the_farthest_image_counts_and_what_is_not_finite_is_infinitely_far() -> None:
    exact = torch.ones(3, 4, 2)
    latent = exact.clone()
    latent[1] += 0.25
    latent[2] -= 0.5
    assert image_error(latent, exact) == pytest.approx(0.5)
    assert image_error(exact, exact) == 0.0
    latent[0, 0] = torch.nan
    assert image_error(latent, exact) == math.inf
    with pytest.raises(ValueError, match="of one shape"):
        image_error(latent[:2], exact)


def test_a_gate_needs_a_limit(bank: StudentBank, host: Host) -> None:
    with pytest.raises(ValueError, match="image_limit"):
        gate_on_images(bank, measured(None, close(6)), host)
    for bad in ({"limit": 0.0}, {"limit": math.inf}, {"limit": 0.1, "images": 0}):
        with pytest.raises(ValueError, match="image gate"):
            ImageGate(**bad)  # type: ignore[arg-type]
