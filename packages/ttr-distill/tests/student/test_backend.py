from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, Route
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker, ReadyGuard

CallMaker = Callable[..., AttentionCall]
LAYER = LayerKey("single", 0)


def test_it_answers_with_the_student_of_the_layer_without_gradients(make_call: CallMaker) -> None:
    layers = (LAYER, LayerKey("single", 1))
    bank = StudentBank.for_layers(preset("hkr"), layers, 2, 16, seed=1)
    backend = StudentBackend(bank)
    assert backend.name == "student"
    for layer in layers:
        call = make_call(0, layer=layer)
        bank[layer].train()
        answer = backend(call)
        with torch.no_grad():
            assert torch.equal(answer, bank[layer].eval()(call))
        assert not answer.requires_grad
        assert not bank[layer].training
    with torch.no_grad():
        assert not torch.equal(backend(call), bank[LAYER](call))


def test_reasons_are_sentences(make_call: CallMaker) -> None:
    backend = StudentBackend(StudentBank.for_layers(preset("near_far"), (LAYER,), 2, 16))
    call = make_call(0)
    assert backend.refuses(call) is None
    assert backend.refuses(replace(call, layer=None)) == "the host does not name its layers"
    assert backend.refuses(replace(call, layer=LayerKey("single", 9))) == "no student for this layer"
    assert backend.refuses(replace(call, layout=None)) == "the host does not say where text and image tokens lie"
    with pytest.raises(ValueError, match="cannot answer this call: no student for this layer"):
        backend(replace(call, layer=LayerKey("single", 9)))


def test_in_a_router_an_unready_student_never_serves_and_a_ready_one_does(make_call: CallMaker) -> None:
    readiness = ReadinessTracker(ReadinessConfig(minimum_updates=1))
    backend = StudentBackend(StudentBank.for_layers(preset("near_far", tile=2), (LAYER,), 2, 16))
    router = AttentionRouter([Route(backend, (ReadyGuard(readiness),))])
    call = make_call(0)
    teacher = torch.randn_like(call.v)
    for distance, serves in ((None, False), (0.02, False), (0.001, True), (0.5, False)):
        if distance is not None:
            readiness.replace(LAYER, distance, distance)
            readiness.observe(LAYER, distance, distance)
            readiness.flush()
        answer = router(call, lambda _: teacher)
        assert torch.equal(answer, backend(call) if serves else teacher)


def test_half_precision_calls_are_answered_by_a_copy_that_follows_the_weights(make_call: CallMaker) -> None:
    bank = StudentBank.for_layers(preset("local-kernel", radius=1), (LAYER,), 2, 16, seed=1)
    backend, call = StudentBackend(bank), make_call(0, dtype=torch.bfloat16)
    before = backend(call)
    assert before.dtype is torch.bfloat16
    assert {weight.dtype for weight in bank.parameters()} == {torch.float32}
    assert torch.equal(before, bank.serving_copy(torch.bfloat16)[LAYER](call))
    with torch.no_grad():
        bank[LAYER].get_parameter("kernel.key_side.weight").mul_(-2.0)
    after = backend(call)
    assert not torch.equal(after, before)
    assert torch.equal(after, bank.serving_copy(torch.bfloat16)[LAYER](call))


@pytest.mark.parametrize("native", [torch.bfloat16, None])
@pytest.mark.parametrize(
    ("name", "follows"), [("hkr", True), ("hkr-joint", True), ("local-kernel", False), ("near_far", False)]
)
def test_mixed_precision_changes_the_products_of_networks_alone(
    make_call: CallMaker, monkeypatch: pytest.MonkeyPatch, name: str, follows: bool, native: torch.dtype | None
) -> None:
    monkeypatch.setattr("ttr_distill.student.backend.native_products", lambda device: native)
    bank = StudentBank.for_layers(preset(name), (LAYER,), 2, 16, seed=1)
    call = make_call(0)
    full, mixed = StudentBackend(bank)(call), StudentBackend(bank, mixed_precision=True)(call)
    assert mixed.dtype is torch.float32
    assert {weight.dtype for weight in bank.parameters()} <= {torch.float32}
    if follows and native is not None:
        assert torch.equal(mixed, bank.serving_copy(native)[LAYER](call))
        assert 0 < float((mixed - full).norm() / full.norm()) < 0.01
    else:
        assert torch.equal(mixed, full)
