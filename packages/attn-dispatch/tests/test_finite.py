import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, Route, StepContext
from attn_dispatch.adapters.comfyui import install
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher
from attn_dispatch.finite import FiniteBackend
from torch import Tensor
from torch.nn import functional

sdpa = functional.scaled_dot_product_attention


def make_call(layer: int | None = 0, sigma: float = 0.5) -> AttentionCall:
    g = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(1, 2, 9, 8, generator=g) for _ in range(3))
    return AttentionCall(q, k, v, layer=None if layer is None else LayerKey("single", layer), step=StepContext(sigma))


class Breaking:
    """Half of exact attention, and one NaN in some layers."""

    name = "breaking"

    def __init__(self, *layers: int | None, value: float = float("nan")) -> None:
        self.layers = layers
        self.value = value
        self.asked: list[int | None] = []
        self.log: list[str] = []

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> Tensor:
        index = None if call.layer is None else call.layer.index
        self.asked.append(index)
        output = 0.5 * sdpa(call.q, call.k, call.v)
        if index in self.layers and (call.layer is None or call.layer.stream == "single"):
            output[0, 1, 4, 3] = self.value
        return output

    def begin_run(self) -> None:
        self.log.append("begin")

    def end_run(self) -> None:
        self.log.append("end")


class OnDevice(FiniteBackend):
    """Treats tensors as if a device still computed them."""

    def _is_ready(self, output: Tensor) -> bool:
        return False


def native(call: AttentionCall) -> Tensor:
    return sdpa(call.q, call.k, call.v)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_on_a_cpu_the_exact_result_replaces_it_and_the_layer_is_out(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    breaking = Breaking(1, 2, value=value)
    router = AttentionRouter([Route(FiniteBackend(breaking))])
    router.begin_run()
    with caplog.at_level(logging.INFO):
        for sigma in (0.9, 0.5):
            for layer in (0, 1, 2):
                call = make_call(layer, sigma)
                expected = native(call) if layer else 0.5 * native(call)
                assert torch.equal(router(call, native), expected)
    router.end_run()
    assert breaking.asked == [0, 1, 2, 0]
    assert router.report.counts() == {"breaking": 2, "native": 4}
    assert router.report.declines() == {
        "the output is not finite": 2,
        "layer single:1 gave values that are not finite": 1,
        "layer single:2 gave values that are not finite": 1,
    }
    (record,) = caplog.records
    assert record.getMessage() == (
        "breaking: layer single:1 gave values that are not finite at sigma 0.9; "
        "exact attention there for the rest of the run"
    )
    assert breaking.log == ["begin", "end"]
    router.begin_run()
    router(make_call(1), native)
    assert breaking.asked[-1] == 1


def test_inputs_that_are_not_finite_blame_no_layer() -> None:
    guard = FiniteBackend(Breaking())
    call = make_call()
    broken = replace(call, v=call.v * float("inf"))
    router = AttentionRouter([Route(guard)])
    router(broken, native)
    assert router.report.declines() == {"the output is not finite": 1}
    assert guard.out == {}
    assert torch.equal(router(call, native), 0.5 * native(call))


def test_finite_outputs_pass_as_they_are() -> None:
    for guard in (FiniteBackend(Breaking()), OnDevice(Breaking())):
        assert torch.equal(guard(make_call()), 0.5 * native(make_call()))
        assert guard.name == "breaking"


def test_on_a_device_a_step_is_made_again_without_the_layer() -> None:
    breaking = Breaking(1)
    router = AttentionRouter([Route(OnDevice(breaking))])
    router.begin_run()
    for times in (2, 1):
        made = 0
        again = True
        while again:
            outputs = [router(make_call(layer), native) for layer in (0, 1, 2)]
            again = router.end_step()
            made += 1
        assert made == times
        assert all(output.isfinite().all() for output in outputs)
        assert torch.equal(outputs[1], native(make_call()))
    router.end_run()
    assert breaking.asked == [0, 1, 2, 0, 2, 0, 2]
    assert not router.end_step()


def test_a_step_is_made_at_most_three_times() -> None:
    breaking = Breaking(*range(6))
    router = AttentionRouter([Route(OnDevice(breaking))])
    router.begin_run()
    made, again = 0, True
    while again:
        for layer in range(6):
            router(make_call(layer), native)
        again = router.end_step()
        made += 1
    assert made == 3
    assert breaking.asked == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5]


def test_in_a_host_that_ends_no_steps_the_layer_is_out_by_the_end_of_the_run() -> None:
    guard = OnDevice(Breaking(1))
    guard.begin_run()
    for sigma in (0.9, 0.5):
        for layer in (0, 1):
            guard(make_call(layer, sigma))
    assert not guard.out
    guard.end_run()
    assert list(guard.out) == [LayerKey("single", 1)]


def test_an_unnamed_layer_loses_the_backend() -> None:
    guard = FiniteBackend(Breaking(None))
    router = AttentionRouter([Route(guard)])
    for _ in range(2):
        assert torch.equal(router(make_call(None), native), native(make_call(None)))
    assert router.report.declines()["an unnamed layer gave values that are not finite"] == 1


@pytest.mark.parametrize("kind", [FiniteBackend, OnDevice])
def test_no_value_that_is_not_finite_leaves_a_step_of_comfyui(kind: type[FiniteBackend]) -> None:
    def sample(router: AttentionRouter, **layouts: Any) -> Tensor:
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 4, 8, 8, generator=g)
        words = torch.randn(1, 5, 8, generator=g)
        patcher = install(FakeModelPatcher(FakeFlux()), router)
        with torch.no_grad():
            return FakeGuider(patcher, 2.0).sample(noise, torch.tensor([1.0, 0.6, 0.0]), words, -words)

    class Without(Breaking):
        def refuses(self, call: AttentionCall) -> str | None:
            return "bad" if call.layer == LayerKey("single", 1) else None

    expected = sample(AttentionRouter([Route(Without())]))
    router = AttentionRouter([Route(kind(Breaking(1)))])
    assert torch.equal(sample(router), expected)
    assert not torch.equal(expected, sample(AttentionRouter()))


@pytest.mark.gpu
def test_on_cuda_nothing_waits_and_the_layer_goes_out() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    guard = FiniteBackend(Breaking(1))
    guard.begin_run()
    with torch.inference_mode():
        for sigma in (0.9, 0.5, 0.2):
            for layer in (0, 1):
                call = make_call(layer, sigma)
                call = replace(call, q=call.q.cuda(), k=call.k.cuda(), v=call.v.cuda())
                with torch.cuda.device(0):
                    torch.cuda.set_sync_debug_mode("error")
                    try:
                        if guard.refuses(call) is None:
                            guard(call)
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    assert list(guard.out) == [LayerKey("single", 1)]
    guard.end_run()
