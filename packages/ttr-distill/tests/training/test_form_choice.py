from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor
from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.presets import build_student, preset
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.form_choice import keep_better_form, mean_distance
from ttr_distill.training.replay import ReplaySample

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]


def sampled(call: AttentionCall, target: Tensor, student: StudentAttention) -> ReplaySample:
    assert call.layout is not None
    with training_mode():
        sample = capture(
            call,
            target,
            LayerKey("single", 0),
            call.layout,
            student.select(call),
            CaptureConfig(storage_dtype="float32"),
            seed=0,
            generator=torch.Generator(),
        )
    assert sample is not None
    return sample


def test_the_trained_form_stays_only_where_it_is_better(make_call: CallMaker, native: Native) -> None:
    student = build_student(preset("near_far", tile=3, top_k=0), 2, 16)
    samples = [sampled(make_call(seed), native(make_call(seed)), student) for seed in range(2)]
    plain = mean_distance(student, samples)
    for temperature, better in ((0.2, False), (1.0, False), (0.97, None)):
        with torch.no_grad():
            student.state_dict()["temperature"].fill_(temperature)
        with training_mode():
            trained = mean_distance(student, samples)
            kept, distance = keep_better_form(student, samples)
        assert kept == (trained[0] < 0.99 * plain[0])
        assert better is None or kept == better
        assert distance == pytest.approx(plain)
        left = student.state_dict()["temperature"]
        assert torch.equal(left, torch.full_like(left, temperature if kept else 1.0))


def test_held_out_steps_judge_where_there_are_any(make_call: CallMaker, native: Native) -> None:
    """The trained form answers the trainable call perfectly and the held-out one badly."""
    student = build_student(preset("near_far", tile=3, top_k=0), 2, 16)
    with torch.no_grad():
        student.state_dict()["temperature"].fill_(0.3)
        flattered = make_call(1)
        liked = sampled(flattered, student(flattered), student)
    held = replace(sampled(make_call(2), native(make_call(2)), student), trainable=False)
    with training_mode():
        assert keep_better_form(student, [*[liked] * 9, held])[0] is False
        with torch.no_grad():
            student.state_dict()["temperature"].fill_(0.3)
        assert keep_better_form(student, [liked])[0] is True


def test_a_student_of_one_form_is_refused(make_call: CallMaker, native: Native) -> None:
    student = build_student(preset("hkr", landmark_minimum=8), 2, 16)
    with pytest.raises(ValueError, match="HkrStudent has no training-free form"):
        keep_better_form(student, [sampled(make_call(0), native(make_call(0)), student)])
