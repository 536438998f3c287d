from typing import Any

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    NativeAttention,
)
from attn_dispatch.testing import RecordingHandler
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from ttr_distill.adapters.diffusers import DiffusersHost

diffusers = pytest.importorskip("diffusers")

WORDS = 5
NAMES = ("double:0", "double:1", "single:0", "single:1", "single:2")


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
        )
    return model.eval()


def fractional_ids(rows: int, columns: int, *, image: float = 0.0, scale: float = 16.0) -> Tensor:
    row = (torch.arange(rows) + 0.5) * scale / rows
    column = (torch.arange(columns) + 0.5) * scale / columns
    ids = torch.full((rows * columns, 3), image)
    ids[:, 1] = row.repeat_interleave(columns)
    ids[:, 2] = column.repeat(rows)
    return ids


def make_inputs(rows: int = 3, columns: int = 4, *, batch: int = 1, ids: Tensor | None = None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    ids = fractional_ids(rows, columns) if ids is None else ids
    return {
        "hidden_states": torch.randn(batch, ids.shape[-2], 16, generator=g),
        "encoder_hidden_states": torch.randn(batch, WORDS, 64, generator=g),
        "pooled_projections": torch.randn(batch, 64, generator=g),
        "timestep": torch.full((batch,), 0.75),
        "img_ids": ids,
        "txt_ids": torch.zeros(WORDS, 3),
        "return_dict": False,
    }


def count_hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def assert_untouched(model: nn.Module) -> None:
    assert count_hooks(model) == 0
    assert _get_current_function_mode_stack() == []


class Raising(RecordingHandler):
    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.error = error
        self.after = after

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        if len(self.calls) == self.after:
            raise self.error
        return super().__call__(call, native)


class Constant(RecordingHandler):
    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        self.calls.append(call)
        return torch.zeros_like(call.q)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_leaves_nothing_behind(flux: nn.Module, error: BaseException, after: int) -> None:
    inputs = make_inputs()
    with torch.inference_mode():
        expected = flux(**inputs)[0]
        with pytest.raises(type(error)) as caught, DiffusersHost(flux, Raising(error, after)):
            flux(**inputs)
        assert caught.value is error
        assert_untouched(flux)
        assert torch.equal(flux(**inputs)[0], expected)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_run_goes_on_after_an_error_inside_the_context(flux: nn.Module, error: BaseException) -> None:
    handler = Raising(error, 3)
    with torch.no_grad(), DiffusersHost(flux, handler):
        with pytest.raises(type(error)):
            flux(**make_inputs())
        handler.after = -1
        flux(**make_inputs())
    assert tuple(str(call.layer) for call in handler.calls[3:]) == NAMES
    assert_untouched(flux)


def test_after_an_error_nothing_more_is_caught(flux: nn.Module) -> None:
    handler = Raising(RuntimeError("bug"), 3)
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), DiffusersHost(flux, handler):
        with pytest.raises(RuntimeError, match="bug"):
            flux(**make_inputs())
        handler.after = -1
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert _get_current_function_mode_stack() == []
    assert len(handler.calls) == 3


def test_hooks_of_others_run_outside_the_mode(flux: nn.Module) -> None:
    depth: list[int] = []
    attention = flux.get_submodule("transformer_blocks.0.attn")

    def look(module: nn.Module, args: object, output: object) -> None:
        depth.append(len(_get_current_function_mode_stack()))

    before = attention.register_forward_hook(look)
    with torch.no_grad(), DiffusersHost(flux, RecordingHandler()), DiffusersHost(flux, RecordingHandler()):
        after = attention.register_forward_hook(look)
        flux(**make_inputs())
        after.remove()
    before.remove()
    assert depth == [0, 0]


def test_an_interrupt_in_nested_hosts_leaves_nothing_behind(flux: nn.Module) -> None:
    outer, inner = DiffusersHost(flux, RecordingHandler()), DiffusersHost(flux, Raising(KeyboardInterrupt(), 2))
    with pytest.raises(KeyboardInterrupt), outer, inner:
        flux(**make_inputs())
    assert_untouched(flux)


def test_an_error_before_our_hook_leaves_nothing_behind(flux: nn.Module) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("another hook")

    attention = flux.get_submodule("single_transformer_blocks.1.attn")
    foreign = attention.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="another hook"), DiffusersHost(flux, RecordingHandler()):
            flux(**make_inputs())
    finally:
        foreign.remove()
    assert_untouched(flux)


def test_hosts_nest(flux: nn.Module) -> None:
    inputs = make_inputs()
    outer, inner = RecordingHandler(), RecordingHandler()
    with torch.inference_mode():
        expected = flux(**inputs)[0]
        with DiffusersHost(flux, outer, cfg_scale=2.0):
            with DiffusersHost(flux, inner, cfg_scale=5.0):
                assert torch.equal(flux(**inputs)[0], expected)
            assert (len(outer.calls), len(inner.calls)) == (5, 5)
            flux(**inputs)
    assert (len(outer.calls), len(inner.calls)) == (10, 5)
    assert {call.step.cfg_scale for call in outer.calls if call.step} == {2.0}
    assert {call.step.cfg_scale for call in inner.calls if call.step} == {5.0}
    assert tuple(str(call.layer) for call in outer.calls[:5]) == NAMES
    assert_untouched(flux)


def test_the_inner_host_answers_first(flux: nn.Module) -> None:
    outer, inner = RecordingHandler(), Constant()
    with torch.no_grad(), DiffusersHost(flux, outer), DiffusersHost(flux, inner):
        flux(**make_inputs())
    assert (len(outer.calls), len(inner.calls)) == (0, 5)


def test_a_host_can_be_entered_again_but_not_twice_at_once(flux: nn.Module) -> None:
    handler = RecordingHandler()
    host = DiffusersHost(flux, handler)
    for _ in range(2):
        with torch.no_grad(), host:
            flux(**make_inputs())
    assert len(handler.calls) == 10
    with host, pytest.raises(ValueError, match="entered already"), host:
        pass
    assert_untouched(flux)


def test_outside_attention_modules_nothing_is_caught(flux: nn.Module) -> None:
    handler = RecordingHandler()
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    depth: list[int] = []
    mlp = flux.get_submodule("single_transformer_blocks.0.proj_mlp")
    watch = mlp.register_forward_pre_hook(lambda module, args: depth.append(len(_get_current_function_mode_stack())))
    try:
        with torch.no_grad(), DiffusersHost(flux, handler):
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            flux(**make_inputs())
    finally:
        watch.remove()
    assert depth == [0]
    assert len(handler.calls) == 5
