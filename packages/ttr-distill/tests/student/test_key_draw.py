from collections.abc import Iterator
from itertools import cycle
from typing import Literal

import pytest
import torch
from torch import Tensor
from ttr_distill.student.feature_map import KernelFeatureMap, drawing_keys
from ttr_distill.student.key_draw import KeyDraw, KeyParts, weighted

QUERIES, KEYS, COUNT = 12, 40, 10


class Turns(KeyDraw):
    """Draws every fourth part of the keys in turn."""

    def __init__(self) -> None:
        super().__init__(COUNT, torch.Generator())
        order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(7))
        parts = [(order[n : n + COUNT], torch.cat([order[:n], order[n + COUNT :]])) for n in range(0, KEYS, COUNT)]
        turns: Iterator[tuple[Tensor, Tensor]] = cycle(parts)
        object.__setattr__(self, "turns", turns)

    def split(self, keys: int, device: torch.device) -> KeyParts | None:
        assert (keys, device.type) == (KEYS, "cpu")
        drawn, rest = next(self.turns)  # type: ignore[attr-defined]
        return KeyParts(drawn, rest, KEYS / COUNT)


def new_map(**settings: object) -> KernelFeatureMap:
    generator = torch.Generator().manual_seed(1)
    return KernelFeatureMap(16, 256, generator=generator, **settings).double()  # type: ignore[arg-type]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, 16), (KEYS, 16), (KEYS, 8))
    q, k, v = (2 * torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return q, k, v


def learn(features: KernelFeatureMap, draw: KeyDraw | None, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Answer and differentiate, with a loss in which every weight of a key stands in a denominator too."""
    with drawing_keys(features, draw):
        part = features.attend(*tensors(), key_mask=mask, eps=1e-9)
    gradients = torch.autograd.grad(part.out.square().sum() + part.lse.sum(), list(features.parameters()))
    return torch.cat([part.out.flatten(), part.lse.flatten()]), list(gradients)


@pytest.mark.parametrize("workspace_bytes", [2**29, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("split_qk", [True, False])
def test_the_answer_is_that_of_all_keys_and_the_mean_gradient_too(
    workspace_bytes: int, masked: bool, split_qk: bool
) -> None:
    features = new_map(workspace_bytes=workspace_bytes, split_qk=split_qk)
    mask = torch.rand(2, KEYS, generator=torch.Generator().manual_seed(3)) > 0.4 if masked else None
    answer, gradients = learn(features, None, mask)
    draw = Turns()
    found = [learn(features, draw, mask) for _ in range(KEYS // COUNT)]
    for other, _ in found:
        torch.testing.assert_close(other, answer, rtol=1e-10, atol=1e-12)
    for number, expected in enumerate(gradients):
        each = [parts[number] for _, parts in found]
        torch.testing.assert_close(torch.stack(each).mean(dim=0), expected, rtol=1e-8, atol=1e-12)
        if number >= 6:
            assert not torch.allclose(each[0], expected, rtol=0.1), "a draw is an estimate"


def test_the_queries_learn_from_all_keys_in_every_draw() -> None:
    features = new_map()
    _, exact = learn(features, None, None)
    _, drawn = learn(features, KeyDraw(5, torch.Generator().manual_seed(0)), None)
    torch.testing.assert_close(drawn[:6], exact[:6], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("layers", "training", "count"), [(2, True, 5), (3, False, 5), (3, True, KEYS)])
def test_when_all_keys_teach(layers: Literal[2, 3], training: bool, count: int) -> None:
    features = new_map(layers=layers).train(training)
    _, exact = learn(features, None, None)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    _, same = learn(features, KeyDraw(count, generator), None)
    assert all(torch.equal(one, other) for one, other in zip(exact, same, strict=True))
    assert torch.equal(generator.get_state(), before)


def test_a_draw_is_a_part_of_all_keys_and_belongs_to_its_stream() -> None:
    first, again, other = (KeyDraw(30, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    parts, same, different = (draw.split(100, torch.device("cpu")) for draw in (first, again, other))
    assert parts is not None
    assert same is not None
    assert different is not None
    assert parts.drawn.numel() == 30
    assert parts.weight == pytest.approx(100 / 30)
    assert torch.cat([parts.drawn, parts.rest]).sort().values.equal(torch.arange(100))
    assert torch.equal(parts.drawn, same.drawn)
    assert not torch.equal(parts.drawn, different.drawn)
    following = first.split(100, torch.device("cpu"))
    assert following is not None
    assert not torch.equal(parts.drawn, following.drawn)


def test_the_draw_is_gone_after_an_error() -> None:
    features = new_map()
    with pytest.raises(KeyError), drawing_keys(features, Turns()):
        raise KeyError
    assert features.key_draw is None


def test_weighting_changes_the_gradient_and_not_the_value() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for weight in (0.0, 0.25, 1.0, 7.0):
        y = weighted(x, weight)
        assert torch.equal(y, x)
        if weight:
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full((50,), weight))
        else:
            assert not y.requires_grad
