from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch.utils._python_dispatch import TorchDispatchMode
from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import PRESETS, build_student, preset
from ttr_distill.student.serving import ServingCopies, serving_copy

CallMaker = Callable[..., AttentionCall]
LAYER = LayerKey("single", 0)


def made(name: str = "hkr") -> StudentAttention:
    return build_student(preset(name), 2, 16, generator=torch.Generator().manual_seed(0))


def test_only_feature_maps_are_cast_and_the_original_stays() -> None:
    student = made()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copy = serving_copy(student, torch.bfloat16)
    for name, value in copy.state_dict().items():
        assert value.dtype is (torch.bfloat16 if name.startswith("kernel.") else torch.float32), name
    assert not any(weight.requires_grad for weight in copy.parameters())
    assert all(weight.requires_grad for weight in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("change", ["optimizer", "fused optimizer", "load_state_dict", "in place", "move"])
def test_a_copy_is_kept_until_the_weights_change(change: str) -> None:
    student, copies = made(), ServingCopies()
    first = copies.get(LAYER, student, torch.bfloat16)
    assert copies.get(LAYER, student, torch.bfloat16) is first
    weight = student.get_parameter("kernel.phi_net_q.4.bias")
    if "optimizer" in change:
        student.train()
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused="fused" in change).step()
    elif change == "load_state_dict":
        student.load_state_dict({name: value + 1 for name, value in student.state_dict().items()})
    elif change == "in place":
        with torch.no_grad():
            weight.add_(1.0)
    else:
        student.to(torch.float64)
    second = copies.get(LAYER, student, torch.bfloat16)
    assert second is not first
    expected = student.get_parameter("kernel.phi_net_q.4.bias").detach().to(torch.bfloat16)
    assert torch.equal(second.get_parameter("kernel.phi_net_q.4.bias"), expected)


def test_full_precision_and_students_without_a_feature_map_need_no_copy() -> None:
    student, near_far = made(), made("near_far")
    assert ServingCopies().get(LAYER, student, torch.float32) is student
    assert ServingCopies().get(LAYER, near_far, torch.bfloat16) is near_far


class NoReads(TorchDispatchMode):
    """Fails on a wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


def test_looking_for_a_change_reads_no_value() -> None:
    student, copies = made(), ServingCopies()
    with NoReads():
        copies.get(LAYER, student, torch.bfloat16)
        copies.get(LAYER, student, torch.bfloat16)


@pytest.mark.parametrize("name", PRESETS)
def test_a_cast_bank_answers_nearly_as_the_bank(make_call: CallMaker, name: str) -> None:
    bank = StudentBank.for_layers(preset(name), (LAYER,), 2, 16)
    call, exact = make_call(0, dtype=torch.bfloat16), make_call(0)
    with torch.inference_mode():
        cast = bank.serving_copy(torch.bfloat16)
        half, full = cast[LAYER](call), bank[LAYER](exact)
    assert half.dtype is torch.bfloat16
    assert float((half.float() - full).norm() / full.norm()) < 0.02
    with training_mode():
        bank[LAYER](exact).sum().backward()
