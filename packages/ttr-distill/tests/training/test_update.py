import math
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
from ttr_distill.training.loss import DistillLoss, heldout_distance
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.update import UpdateConfig, make_optimizer, measure_heldout, update_student

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]


def hkr() -> StudentAttention:
    return build_student(preset("hkr", landmark_minimum=8), 2, 16, generator=torch.Generator().manual_seed(0))


def sampled(call: AttentionCall, target: Tensor, student: StudentAttention) -> ReplaySample:
    assert call.layout is not None
    config = CaptureConfig(query_cap=40, heldout_cap=10, storage_dtype="float32")
    sample = capture(
        call,
        target,
        LayerKey("single", 0),
        call.layout,
        student.select(call),
        config,
        seed=0,
        generator=torch.Generator().manual_seed(1),
    )
    assert sample is not None
    return sample


def test_parameter_groups() -> None:
    student, loss = hkr(), DistillLoss()
    config = UpdateConfig(learning_rate=0.01, alpha_rate_factor=5, conditioner_rate_factor=0.1, weight_decay=0.3)
    optimizer = make_optimizer(student, loss, config)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for name, parameter in (*student.named_parameters(), *loss.named_parameters()):
        expected = (0.01, 0.3) if parameter.ndim > 1 else (0.01, 0.0)
        expected = (0.05, 0.0) if name == "alpha" else expected
        expected = (pytest.approx(0.001), 0.0) if name.startswith("conditioner.") else expected
        assert found[id(parameter)] == expected, name


def test_a_step_equals_torch_adamw_on_the_training_queries(make_call: CallMaker, native: Native) -> None:
    call = make_call(0)
    student, twin = hkr(), hkr()
    sample = sampled(call, native(call), student)
    config = UpdateConfig(clip_norm=0.2)
    loss, twin_loss = DistillLoss(), DistillLoss()
    optimizer = make_optimizer(student, loss, config)
    with training_mode():
        result = update_student(student, loss, optimizer, sample, config)
    rows = sample.train.positions
    total = twin_loss(twin(replace(call, q=call.q[:, :, rows])), native(call)[:, :, rows]).total
    total.backward()
    parameters = [*twin.parameters(), *twin_loss.parameters()]
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
    assert (result.loss, result.gradient_norm) == pytest.approx((float(total.detach()), norm), rel=1e-4)
    assert norm > 0.2, "clipping is part of this test"
    with torch.no_grad():
        for p in parameters:
            assert p.grad is not None
            p.grad *= 0.2 / norm
    make_optimizer(twin, twin_loss, config).step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=2e-5)
    assert not result.skipped
    assert not student.training
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("where", ["weights", "target"])
def test_a_number_that_is_not_finite_skips_the_step(make_call: CallMaker, native: Native, where: str) -> None:
    call = make_call(0)
    student, loss = hkr(), DistillLoss()
    sample = sampled(call, native(call), student)
    optimizer = make_optimizer(student, loss, UpdateConfig())
    with training_mode():
        update_student(student, loss, optimizer, sample, UpdateConfig())
        if where == "weights":
            with torch.no_grad():
                student.get_parameter("alpha").fill_(math.nan)
        else:
            spoiled = sample.train.target.clone()
            spoiled[0, 0, 0, 0] = math.inf
            sample = replace(sample, train=replace(sample.train, target=spoiled))
        before = {name: value.clone() for name, value in student.state_dict().items()}
        steps = [float(state["step"]) for state in optimizer.state.values()]
        result = update_student(student, loss, optimizer, sample, UpdateConfig())
    assert result.skipped
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert [float(state["step"]) for state in optimizer.state.values()] == steps
    assert math.isfinite(float(loss.log_var_huber.detach()))


@pytest.mark.parametrize("name", ["hkr", "near_far"])
def test_held_out_queries_are_measured_and_never_change_the_student(
    make_call: CallMaker, native: Native, name: str
) -> None:
    settings = {"landmark_minimum": 8} if name == "hkr" else {"tile": 2, "top_k": 2}
    student = build_student(preset(name, **settings), 2, 16, generator=torch.Generator().manual_seed(0))
    call = make_call(0)
    sample = sampled(call, native(call), student)
    rows = sample.heldout.positions
    answer = student(replace(call, q=call.q[:, :, rows]), query_positions=rows, selection=student.select(call)).detach()
    expected = heldout_distance(answer, native(call)[:, :, rows])
    assert measure_heldout(student, sample) == pytest.approx(expected, rel=1e-4)
    other = replace(sample, heldout=replace(sample.heldout, target=sample.heldout.target * 7))
    ends = []
    for one in (sample, other):
        twin = build_student(preset(name, **settings), 2, 16, generator=torch.Generator().manual_seed(0))
        loss = DistillLoss()
        with training_mode():
            update_student(twin, loss, make_optimizer(twin, loss, UpdateConfig()), one, UpdateConfig())
        ends.append(twin.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_masked_queries_do_not_count(make_call: CallMaker, native: Native) -> None:
    mask = torch.ones(1, 106, dtype=torch.bool)
    mask[:, ::3] = False
    call = make_call(0, key_mask=mask)
    student = hkr()
    sample = sampled(call, native(call), student)
    spoiled = sample.heldout.target.clone()
    spoiled[:, :, ~mask[0, sample.heldout.positions]] += 100.0
    assert not torch.equal(spoiled, sample.heldout.target)
    changed = replace(sample, heldout=replace(sample.heldout, target=spoiled))
    assert measure_heldout(student, changed) == pytest.approx(measure_heldout(student, sample))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["hkr", "near_far"])
def test_a_step_in_chunks_of_queries_is_the_same_step(
    make_call: CallMaker, native: Native, name: str, masked: bool
) -> None:
    mask = torch.arange(106)[None] % 5 != 1 if masked else None
    call = make_call(0, key_mask=mask)
    settings = {"landmark_minimum": 8, "adaptive_alpha": False} if name == "hkr" else {"tile": 2, "top_k": 2}
    ends = []
    for chunk in (None, 7):
        student = build_student(preset(name, **settings), 2, 16, generator=torch.Generator().manual_seed(0))
        loss = DistillLoss()
        optimizer = make_optimizer(student, loss, UpdateConfig())
        with training_mode():
            sample = sampled(call, native(call), student)
            result = update_student(student, loss, optimizer, sample, UpdateConfig(), query_chunk=chunk)
        ends.append(result)
    assert ends[1].loss == pytest.approx(ends[0].loss, rel=1e-4)
    assert ends[1].huber == pytest.approx(ends[0].huber, rel=1e-4)
    assert ends[1].gradient_norm == pytest.approx(ends[0].gradient_norm, rel=1e-3)


def test_a_cosine_schedule_shrinks_every_group_alike(make_call: CallMaker, native: Native) -> None:
    config = UpdateConfig(learning_rate=0.01, schedule="cosine", schedule_updates=10, final_rate=0.2)
    rates = [config.rate(n) for n in (0, 5, 10, 99)]
    assert rates == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert UpdateConfig().rate(10_000) == 1.0
    student, loss = hkr(), DistillLoss()
    optimizer = make_optimizer(student, loss, config)
    before = [group["lr"] for group in optimizer.param_groups]
    with training_mode():
        sample = sampled(make_call(0), native(make_call(0)), student)
        for _ in range(2):
            update_student(student, loss, optimizer, sample, config, rate=config.rate(5))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.6 * rate for rate in before])


@pytest.mark.parametrize(
    "bad",
    [
        {"final_rate": 2.0},
        {"schedule": "linear"},
        {"average_decay": 1.0},
        {"learning_rate": 0.0},
        {"huber_beta": 0.0},
        {"clip_norm": -1.0},
        {"weight_decay": math.nan},
        {"key_count": -1},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        UpdateConfig(**bad)  # type: ignore[arg-type]
