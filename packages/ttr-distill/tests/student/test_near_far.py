from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall
from attn_kernels import NearFarConfig, near_far_attention, near_far_keys
from torch import Tensor
from ttr_distill.student.near_far import NearFarStudent

CallMaker = Callable[..., AttentionCall]
CONFIG = NearFarConfig(tile=2, radius=1, top_k=3)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def corrected(temperature: float, bias: float) -> NearFarStudent:
    student = NearFarStudent(CONFIG, 2, 16)
    with torch.no_grad():
        student.temperature.copy_(torch.tensor([temperature, 1.0]))
        student.bias.copy_(torch.tensor([bias, 0.0]))
    return student


def test_untrained_it_is_the_operator_and_close_to_the_teacher(
    make_call: CallMaker, native: Callable[[AttentionCall], Tensor]
) -> None:
    call = make_call(0)
    student = NearFarStudent(CONFIG, 2, 16)
    assert call.layout is not None
    expected = near_far_attention(call.q, call.k, call.v, grids=call.layout.grids, config=CONFIG).out
    torch.testing.assert_close(student(call), expected)
    teacher = native(call)
    mean_of_v = call.v.mean(dim=2, keepdim=True).expand_as(teacher)
    assert relative(student(call), teacher) < 0.15 < 0.5 < relative(mean_of_v, teacher)


def test_text_queries_and_a_covering_radius_are_exact(
    make_call: CallMaker, native: Callable[[AttentionCall], Tensor]
) -> None:
    call = make_call(1)
    assert relative(NearFarStudent(CONFIG, 2, 16)(call)[:, :, :7], native(call)[:, :, :7]) < 1e-5
    whole = NearFarStudent(replace(CONFIG, radius=9), 2, 16)
    assert relative(whole(call), native(call)) < 1e-5


def test_sampled_queries_answer_as_in_the_whole_call(make_call: CallMaker) -> None:
    call = make_call(2, batch=2)
    student = corrected(1.3, -0.4)
    positions = torch.tensor([0, 3, 7, 8, 50, 77, 105])
    some = student(replace(call, q=call.q[:, :, positions]), query_positions=positions, selection=student.select(call))
    torch.testing.assert_close(some, student(call)[:, :, positions], rtol=1e-4, atol=1e-5)


def test_corrections_change_their_head_only_and_get_gradients(make_call: CallMaker) -> None:
    call = make_call(2)
    student, initial = corrected(1.5, 0.7), NearFarStudent(CONFIG, 2, 16)
    assert relative(student(call)[:, 0], initial(call)[:, 0]) > 1e-3
    torch.testing.assert_close(student(call)[:, 1], initial(call)[:, 1])
    positions = torch.arange(7, 40)
    output = student(
        replace(call, q=call.q[:, :, positions]), query_positions=positions, selection=student.select(call)
    )
    output.square().sum().backward()
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_v(make_call: CallMaker, dtype: torch.dtype) -> None:
    student = NearFarStudent(CONFIG, 2, 16)
    with torch.no_grad():
        answer = student(make_call(3, dtype=dtype))
    assert answer.dtype == dtype
    assert student.temperature.dtype == torch.float32


def test_untrained_form_and_cost(make_call: CallMaker) -> None:
    student = corrected(1.5, 0.7)
    assert student.training_free
    student.load_state_dict(student.untrained())
    assert student.temperature.tolist() == [1.0, 1.0]
    assert student.bias.tolist() == [0.0, 0.0]
    layout = make_call(0).layout
    assert layout is not None
    keys = near_far_keys(layout.grids, layout.length, CONFIG)
    assert student.flops(layout, 2, 24, 128) == pytest.approx(4 * 2 * 24 * layout.length * keys * 128)
    assert keys < layout.length
