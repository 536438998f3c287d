"""Conformance: what any handler may rely on in any host. The stand-in runs always, a real ComfyUI by COMFYUI_PATH."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerRange, NativeAttention, Route, SigmaBelow
from attn_dispatch.adapters.comfyui import ComfyOverride, install, installed, uninstall
from attn_dispatch.testing import RecordingHandler
from torch import Tensor
from torch.nn import functional

from .conftest import FakeHost, Host, image_grids, layers

CASES = [(1.0, 1, False), (2.0, 1, False), (1.0, 2, True), (2.0, 2, True)]
SLOT = "optimized_attention_override"


class Refusing:
    name = "refusing"

    def refuses(self, call: AttentionCall) -> str | None:
        return "no"

    def __call__(self, call: AttentionCall) -> Tensor:
        raise AssertionError("asked though it refuses")


class HalfKeys:
    """Attends to every other key."""

    name = "half keys"

    def refuses(self, call: AttentionCall) -> str | None:
        return None if call.key_mask is None and call.attn_bias is None else "masked"

    def __call__(self, call: AttentionCall) -> Tensor:
        return functional.scaled_dot_product_attention(call.q, call.k[:, :, ::2], call.v[:, :, ::2], scale=call.scale)


def all_refusing() -> AttentionRouter:
    return AttentionRouter([Route(Refusing()), Route(HalfKeys(), (lambda call: "never",))])


def late_half_keys() -> AttentionRouter:
    return AttentionRouter([Route(HalfKeys(), (SigmaBelow(0.8),))])


def with_foreign(patcher: Any, function: Callable[..., Any]) -> Any:
    """Another node's override: replaces what was there, as the host's own node does."""
    clone = patcher.clone()
    clone.model_options["transformer_options"][SLOT] = function
    return clone


def doubled(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A foreign override that is no identity."""
    return func(*args, **kwargs) * 1.5


@pytest.mark.parametrize(("cfg", "batch", "references"), CASES)
def test_an_all_refusing_router_is_bit_equal(host: Host, cfg: float, batch: int, references: bool) -> None:
    model = host.model()
    plain = host.sample(model, cfg=cfg, batch=batch, references=references)
    router = all_refusing()
    routed = host.sample(host.install(model, router), cfg=cfg, batch=batch, references=references)
    assert torch.equal(plain, routed)
    assert torch.isfinite(plain).all()
    calls = len(layers()) * 3
    assert router.report.counts() == {"native": calls}
    assert router.report.declines() == {"no": calls, "never": calls}
    assert router.report.runs == 1


@pytest.mark.parametrize(("cfg", "batch", "references"), CASES)
def test_every_call_is_described_exactly(host: Host, cfg: float, batch: int, references: bool) -> None:
    handler = RecordingHandler()
    patcher = host.install(host.model(), handler)
    host.sample(patcher, cfg=cfg, batch=batch, references=references)
    assert (handler.begun, handler.ended) == (1, 1)
    assert [call.layer for call in handler.calls] == list(layers() if host.named else (None,) * len(layers())) * 3
    grids, far = image_grids(host, references=references)
    rows = batch * (1 if cfg == 1 else 2)
    sigmas = []
    for call in handler.calls:
        assert call.layout is not None
        assert (call.layout.text, call.layout.grids, call.layout.references) == (((0, host.words),), grids, far)
        assert call.q.shape[:3] == call.k.shape[:3] == (rows, 2, call.layout.length)
        assert call.step is not None
        assert call.step.cond_or_uncond == ((0,) if cfg == 1 else (1, 0))
        assert call.step.cfg_scale == cfg
        assert call.step.latent_size == host.sizes[0]
        sigmas.append(call.step.sigma)
    assert len(set(sigmas)) == 3
    assert sigmas == sorted(sigmas, reverse=True)
    assert installed(patcher)["attn_dispatch"] is handler


def test_an_approximation_changes_the_image_and_uninstall_restores_it(host: Host) -> None:
    model = host.model()
    plain = host.sample(model)
    before = copy.copy(model.model_options["transformer_options"])
    router = AttentionRouter([Route(HalfKeys())])
    patched = host.install(model, router)
    changed = host.sample(patched)
    assert router.report.counts() == {"half keys": len(layers()) * 3}
    assert (changed - plain).norm() > 1e-3 * plain.norm()
    assert model.model_options["transformer_options"] == before
    assert torch.equal(host.sample(model), plain)
    restored = uninstall(patched)
    assert restored.model_options["transformer_options"] == before
    assert SLOT not in restored.model_options["transformer_options"]
    assert not restored.wrappers.get("outer_sample")
    assert torch.equal(host.sample(restored), plain)
    assert torch.equal(host.sample(patched), changed)
    assert installed(restored) == {}


def test_a_clone_shares_the_handler_and_survives_copying(host: Host) -> None:
    handler = RecordingHandler()
    patched = host.install(host.model(), handler)
    clone = patched.clone()
    host.sample(clone)
    assert handler.begun == 1
    override = patched.model_options["transformer_options"][SLOT]
    assert isinstance(override, ComfyOverride)
    assert clone.model_options["transformer_options"][SLOT] is override
    assert copy.deepcopy(override) is override


@pytest.mark.parametrize("router", [all_refusing, late_half_keys])
def test_the_order_of_nodes_does_not_matter(host: Host, router: Callable[[], AttentionRouter]) -> None:
    model = host.model()
    first, second = router(), router()
    after = host.sample(with_foreign(host.install(model, first), doubled))
    before = host.sample(host.install(with_foreign(model, doubled), second))
    assert torch.equal(after, before)
    assert first.report.counts() == second.report.counts()
    if router is all_refusing:
        assert torch.equal(after, host.sample(with_foreign(model, doubled)))


def test_a_foreign_override_that_chains_to_ours_is_asked_once(host: Host) -> None:
    model = host.model()
    handler = RecordingHandler()
    patched = host.install(model, handler)
    ours = patched.model_options["transformer_options"][SLOT]
    asked: list[int] = []

    def chaining(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        asked.append(1)
        out: Tensor = ours(func, *args, **kwargs)
        return out

    out = host.sample(with_foreign(patched, chaining))
    assert torch.equal(out, host.sample(model))
    assert len(handler.calls) == len(asked) == len(layers()) * 3


def test_several_handlers_live_side_by_side(host: Host) -> None:
    model = host.model()
    plain = host.sample(model)
    first, second = RecordingHandler(), RecordingHandler()
    both = host.install(host.install(model, first, key="first"), second, key="second")
    assert list(installed(both)) == ["first", "second"]
    assert torch.equal(host.sample(both), plain)
    assert len(first.calls) == len(second.calls) == len(layers()) * 3
    only = uninstall(both, key="first")
    assert torch.equal(host.sample(only), plain)
    assert (len(first.calls), len(second.calls)) == (len(layers()) * 3, len(layers()) * 6)
    none = uninstall(only, key="second")
    assert SLOT not in none.model_options["transformer_options"]
    again = host.install(host.install(model, first), second)
    host.sample(again)
    assert len(first.calls) == len(layers()) * 3


def test_uninstalled_below_a_foreign_override_it_lets_calls_pass(host: Host) -> None:
    model = host.model()
    patched = host.install(model, AttentionRouter([Route(HalfKeys())]))
    ours = patched.model_options["transformer_options"][SLOT]
    kept = with_foreign(patched, lambda func, *args, **kwargs: ours(func, *args, **kwargs))
    assert torch.equal(host.sample(uninstall(kept)), host.sample(model))


def test_two_models_at_once_do_not_mix(host: Host) -> None:
    one, two = host.model(0), host.model(1)
    plain = (host.sample(one), host.sample(two))
    outer, inner = RecordingHandler(), RecordingHandler()
    second = host.install(two, inner)
    found: list[Tensor] = []

    def nested(step: int) -> None:
        found.append(host.sample(second, cfg=1.0))

    out = host.sample(host.install(one, outer), on_step=nested)
    assert torch.equal(out, plain[0])
    assert all(torch.equal(image, plain[1]) for image in found)
    assert (len(outer.calls), len(inner.calls)) == (len(layers()) * 3, len(layers()) * 9)
    assert [call.step.sigma for call in outer.calls if call.step] == sorted(
        (call.step.sigma for call in outer.calls if call.step), reverse=True
    )


class OldInterrupt(Exception):
    """The stop button of ComfyUI 0.3."""


class Interrupt(BaseException):
    """The stop button since."""


@pytest.mark.parametrize("kind", [OldInterrupt, Interrupt])
@pytest.mark.parametrize("where", ["step", "handler"])
def test_an_interrupt_passes_and_ends_the_run(host: Host, kind: type[BaseException], where: str) -> None:
    class Failing(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            if where == "handler" and len(self.calls) == 4:
                raise kind("stop")
            return super().__call__(call, native)

        def end_run(self) -> None:
            super().end_run()
            raise RuntimeError("disk full")

    def stop(step: int) -> None:
        if where == "step" and step == 1:
            raise kind("stop")

    model = host.model()
    plain = host.sample(model)
    handler = Failing()
    with pytest.raises(kind, match="stop"):
        host.sample(host.install(model, handler), on_step=stop)
    assert (handler.begun, handler.ended) == (1, 1)
    assert torch.equal(host.sample(model), plain)
    if where == "step":
        with pytest.raises(RuntimeError, match="disk full"):
            host.sample(host.install(model, Failing()))


def test_calls_that_a_handler_makes_itself_do_not_come_back(host: Host) -> None:
    attention = host.attention()
    options: list[dict[str, Any]] = []
    depth: list[int] = []

    class Curious(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            depth.append(1)
            again: Tensor = attention(
                call.q, call.k, call.v, 2, skip_reshape=True, skip_output_reshape=True, transformer_options=options[0]
            )
            torch.testing.assert_close(again, native(call))
            return super().__call__(call, native)

    patched = host.install(host.model(), Curious())
    options.append(patched.model_options["transformer_options"])
    host.sample(patched)
    assert len(depth) == len(layers()) * 3


def test_native_answers_changed_calls(host: Host) -> None:
    model = host.model()
    plain = host.sample(model)

    class Sampling(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            index = torch.tensor([3, 0, 11])
            part = native(replace(call, q=call.q[:, :, index]))
            sharp = native(replace(call, scale=0.3))
            keep = torch.arange(call.k.shape[2]).expand(call.k.shape[0], -1) < 9
            masked = native(replace(call, key_mask=keep))
            exact = super().__call__(call, native)
            torch.testing.assert_close(part, exact[:, :, index])
            sdpa = functional.scaled_dot_product_attention
            torch.testing.assert_close(sharp, sdpa(call.q, call.k, call.v, scale=0.3), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(masked, sdpa(call.q, call.k[:, :, :9], call.v[:, :, :9]), rtol=1e-4, atol=1e-4)
            return exact

    assert torch.equal(host.sample(host.install(model, Sampling())), plain)


def test_compiled_models_stay_right(host: Host) -> None:
    if host.name == "fake old":
        pytest.skip("the other stand-in is compiled, and where there is one, a ComfyUI of that age")
    model = host.model()
    plain = host.sample(model)
    router = AttentionRouter([Route(HalfKeys(), (LayerRange(1, 1, "single"),))])
    patched = host.install(model, router)
    eager = host.sample(patched)
    network = getattr(model, "network", None) or model.model.diffusion_model
    compiled = torch.compile(network.forward, backend="eager")
    network.forward = compiled
    try:
        torch._dynamo.reset()
        assert torch.equal(host.sample(model), plain)
        before = router.report.counts()
        torch.testing.assert_close(host.sample(patched), eager, rtol=1e-4, atol=1e-5)
    finally:
        del network.forward
    if host.named:
        assert router.report.counts() == {name: 2 * count for name, count in before.items()}


def test_lora_and_other_weight_patches_stay(host: Host) -> None:
    if isinstance(host, FakeHost):
        pytest.skip("the stand-in has no weight patches")
    model = host.model()
    name = "diffusion_model.single_blocks.0.linear1.weight"
    shape = model.model.diffusion_model.single_blocks[0].linear1.weight.shape
    change = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.05
    lora = model.clone()
    lora.add_patches({name: ("diff", (change,))}, 1.0)
    plain = host.sample(lora)
    assert not torch.equal(plain, host.sample(model))
    assert torch.equal(host.sample(host.install(lora, all_refusing())), plain)
    patched = host.install(model, all_refusing())
    patched.add_patches({name: ("diff", (change,))}, 1.0)
    assert torch.equal(host.sample(patched), plain)


def test_an_unnamed_host_keeps_layers_away_and_the_rest_working() -> None:
    host = FakeHost(named=False)
    router = AttentionRouter([Route(HalfKeys(), (LayerRange(0, 9),)), Route(HalfKeys())])
    host.sample(host.install(host.model(), router))
    assert router.report.counts() == {"half keys": len(layers()) * 3}
    assert router.report.declines() == {"the host does not name the layer": len(layers()) * 3}


def test_a_key_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="key"):
        install(FakeHost().model(), RecordingHandler(), key="")
