"""A tiny Flux transformer of random weights, what it is called with, and handlers that misbehave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, NativeAttention
from attn_dispatch.testing import RecordingHandler
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

WORDS = 5


def make_flux() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
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


def make_flux_2(*, guidance_embeds: bool = True) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=guidance_embeds,
        )
    return model.eval()


def ids_of(rows: int, columns: int, *, image: float = 0.0, scale: float = 16.0) -> Tensor:
    row = (torch.arange(rows) + 0.5) * scale / rows
    column = (torch.arange(columns) + 0.5) * scale / columns
    ids = torch.full((rows * columns, 3), image)
    ids[:, 1] = row.repeat_interleave(columns)
    ids[:, 2] = column.repeat(rows)
    return ids


def inputs_of(rows: int = 3, columns: int = 4, *, batch: int = 1, ids: Tensor | None = None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    ids = ids_of(rows, columns) if ids is None else ids
    return {
        "hidden_states": torch.randn(batch, ids.shape[-2], 16, generator=g),
        "encoder_hidden_states": torch.randn(batch, WORDS, 64, generator=g),
        "pooled_projections": torch.randn(batch, 64, generator=g),
        "timestep": torch.full((batch,), 0.75),
        "img_ids": ids,
        "txt_ids": torch.zeros(WORDS, 3),
        "return_dict": False,
    }


def check_untouched(model: nn.Module) -> None:
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()) == 0
    assert _get_current_function_mode_stack() == []


class RaisingHandler(RecordingHandler):
    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.error = error
        self.after = after

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        if len(self.calls) == self.after:
            raise self.error
        return super().__call__(call, native)


class ConstantHandler(RecordingHandler):
    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        self.calls.append(call)
        return torch.zeros_like(call.q)


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    """Layers double:0, double:1, single:0, single:1, single:2; 4 heads of width 32."""
    return make_flux()


@pytest.fixture
def new_flux() -> Callable[[], nn.Module]:
    """Makes models equal to ``flux``, for tests that change theirs."""
    return make_flux


@pytest.fixture
def flux_2() -> Callable[..., nn.Module]:
    """Makes Flux 2 models with layers double:0, single:0, single:1; 2 heads of width 32."""
    return make_flux_2


@pytest.fixture
def fractional_ids() -> Callable[..., Tensor]:
    return ids_of


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Any]]:
    return inputs_of


@pytest.fixture
def assert_untouched() -> Callable[[nn.Module], None]:
    return check_untouched


@pytest.fixture
def raising() -> type[RaisingHandler]:
    return RaisingHandler


@pytest.fixture
def constant() -> type[ConstantHandler]:
    return ConstantHandler
