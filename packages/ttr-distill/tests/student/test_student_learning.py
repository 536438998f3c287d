"""What students gain from equally many updates on the same calls."""

from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor
from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.key_draw import KeyDraw
from ttr_distill.student.presets import build_student, preset
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.loss import DistillLoss
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.update import UpdateConfig, make_optimizer, measure_heldout, update_student

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
Learn = Callable[..., tuple[float, float, float]]


@pytest.fixture
def learnt(make_call: CallMaker, native: Native) -> Learn:
    """Train a student; return its cosine distance in the first and the last update, and held out on another call."""

    def sample(seed: int, student: StudentAttention) -> ReplaySample:
        call = make_call(seed, rows=16, columns=16)
        assert call.layout is not None
        found = capture(
            call,
            native(call),
            LayerKey("single", 0),
            call.layout,
            student.select(call),
            CaptureConfig(storage_dtype="float32"),
            seed=0,
            generator=torch.Generator().manual_seed(seed),
        )
        assert found is not None
        return found

    def learn(name: str, updates: int, calls: int, keys: int = 0, **settings: object) -> tuple[float, float, float]:
        config = UpdateConfig(learning_rate=5e-3)
        with training_mode():
            student = build_student(preset(name, **settings), 2, 16, generator=torch.Generator().manual_seed(0)).eval()
            loss = DistillLoss()
            optimizer = make_optimizer(student, loss, config)
            samples = [sample(number, student) for number in range(calls)]
            draw = KeyDraw(keys, torch.Generator().manual_seed(0)) if keys else None
            results = [
                update_student(student, loss, optimizer, samples[number % calls], config, key_draw=draw)
                for number in range(updates)
            ]
            heldout, _ = measure_heldout(student, sample(99, student))
        assert not any(result.skipped for result in results)
        return results[0].cosine, results[-1].cosine, heldout

    return learn


@pytest.mark.parametrize("name", ["hkr", "hkr-joint", "local-kernel", "hedgehog"])
def test_every_learned_student_learns(learnt: Learn, name: str) -> None:
    before, after, _ = learnt(name, 20, 1)
    assert after < 0.85 * before


def test_one_denominator_and_a_window_halve_the_distance_of_hkr(learnt: Learn) -> None:
    assert learnt("hkr-joint", 10, 4)[2] < 0.5 * learnt("hkr", 10, 4)[2]


def test_half_precision_products_learn_as_well_as_float32(learnt: Learn) -> None:
    exact, half = (learnt("hkr", 12, 4, training_dtype=products)[2] for products in ("float32", "bfloat16"))
    assert half == pytest.approx(exact, rel=0.05)
    assert half != exact


def test_a_quarter_of_the_keys_teaches_nearly_as_much_as_all(learnt: Learn) -> None:
    untrained, whole, drawn = (learnt("hkr", updates, 4, keys)[2] for updates, keys in ((1, 0), (40, 0), (40, 64)))
    assert untrained - drawn > 0.9 * (untrained - whole) > 0.1
    assert drawn != whole
