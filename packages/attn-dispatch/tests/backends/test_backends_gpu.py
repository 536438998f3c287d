"""The backends on a CUDA device: same answers as on the CPU, and no wait that was not asked for."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, Backend, LayerKey, StepContext, TokenLayout
from attn_dispatch.backends import (
    HybridBackend,
    HybridBackendConfig,
    NearFarBackend,
    TaylorBackend,
    TaylorBackendConfig,
)
from attn_kernels import NearFarConfig, TokenGrid, relative_l2
from attn_kernels.testing import make_qkv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYOUT = TokenLayout(1031, ((0, 7),), (TokenGrid(7, 32, 32),))
BACKENDS = {
    "near_far": lambda: NearFarBackend(NearFarConfig(tile=4, radius=1, top_k=4)),
    "taylor": lambda: TaylorBackend(TaylorBackendConfig.recommended()),
    "taylor, measured": lambda: TaylorBackend(
        replace(TaylorBackendConfig.recommended(), quality_check=True, log_steps=True, sub_head_blocks=4)
    ),
    "hybrid": lambda: HybridBackend(HybridBackendConfig.recommended()),
    "hybrid, flat": lambda: HybridBackend(HybridBackendConfig(global_P=3, local_window=64, log_quality_stats=True)),
}


def make_call(device: str) -> AttentionCall:
    qkv = make_qkv(1, 2, 1031, 64, dtype=torch.float32, seed=0, smooth_grid=LAYOUT.grids[0])
    q, k, v = (x.to(device) for x in qkv)
    return AttentionCall(q, k, v, layer=LayerKey("single", 3), step=StepContext(0.5), layout=LAYOUT)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
def test_answers_are_those_of_the_cpu(name: str) -> None:
    backends: list[Backend] = [BACKENDS[name](), BACKENDS[name]()]
    there, here = (backend(make_call(device)).cpu() for backend, device in zip(backends, ("cuda", "cpu"), strict=True))
    assert relative_l2(there, here) < 2e-3


@pytest.mark.parametrize("name", BACKENDS)
def test_a_call_does_not_wait_for_the_device(name: str, request: pytest.FixtureRequest) -> None:
    backend, call = BACKENDS[name](), make_call("cuda")
    backend(call)
    request.getfixturevalue("no_waiting")
    assert backend.refuses(call) is None
    backend(call)


def test_figures_of_a_step_arrive_by_themselves() -> None:
    backend = BACKENDS["taylor, measured"]()
    assert isinstance(backend, TaylorBackend)
    backend.begin_run()
    for sigma in (1.0, 0.5):
        backend(replace(make_call("cuda"), step=StepContext(sigma)))
        torch.cuda.synchronize()
    backend(replace(make_call("cuda"), step=StepContext(0.2)))
    assert backend.steps[0].sigma == 1.0
    backend.end_run()
    assert [step.taylor_calls for step in backend.steps] == [1, 1, 1]
