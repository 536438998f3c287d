from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, StepContext, TokenLayout
from attn_dispatch.backends import HybridBackend
from attn_kernels import TokenGrid, near_far_keys, softmax_attention
from attn_kernels.fidelity import fidelity
from attn_kernels.testing import make_qkv
from comfy_nodes.approximation import COARSE_TOKENS, ApproximationConfig
from torch import Tensor

GRID = TokenGrid(20, 24, 24)
LAYOUT = TokenLayout(GRID.stop, ((0, 20),), (GRID,))
QUALITIES = (0.0, 0.25, 0.5, 0.75, 0.95)


def _call(**changes: Any) -> AttentionCall:
    q, k, v = make_qkv(1, 2, LAYOUT.length, 32, logit_std=2.0, dtype=torch.float32, seed=3, smooth_grid=GRID)
    facts = {"layer": LayerKey("double", 3), "step": StepContext(0.5), "layout": LAYOUT}
    return AttentionCall(q, k, v, **{**facts, **changes})


def _native(call: AttentionCall) -> Tensor:
    return softmax_attention(call.q, call.k, call.v, scale=call.scale, key_mask=call.key_mask).out.to(call.q.dtype)


def _ran(router: AttentionRouter, call: AttentionCall) -> dict[str, int]:
    router(call, _native)
    return router.report.counts()


@pytest.mark.parametrize("method", ["near-far", "hybrid"])
def test_a_higher_quality_is_closer(method: str) -> None:
    call = _call()
    exact = _native(call)
    errors = []
    for quality in QUALITIES:
        router = ApproximationConfig(quality=quality, method=method, only_if_faster=False).router()
        errors.append(fidelity(router(call, _native), exact).relative_l2)
        assert "native" not in router.report.counts()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] > 0
    assert method == "hybrid" or errors[0] > 2 * errors[-1]


def test_a_higher_quality_keeps_more_keys() -> None:
    for tile in (4, 8):
        kept = [
            near_far_keys((TokenGrid(0, 96, 96),), 96 * 96, ApproximationConfig(quality=one).near_far(tile))
            for one in QUALITIES
        ]
        assert kept == sorted(set(kept))
    assert ApproximationConfig().near_far(4).top_k == 8
    assert ApproximationConfig().near_far(8).top_k == 2


def test_large_images_get_large_tiles() -> None:
    config = ApproximationConfig()
    backend = config.backend()
    assert not isinstance(backend, HybridBackend)
    side = int(COARSE_TOKENS**0.5) + 1
    large = TokenLayout(side * side, (), (TokenGrid(0, side, side),))
    small = TokenLayout(60 * 60, (), (TokenGrid(0, 60, 60),))
    tiny = torch.empty(0)
    chosen = [backend.config_for(AttentionCall(tiny, tiny, tiny, layout=one)) for one in (small, large, None)]
    assert [None if one is None else one.tile_shape for one in chosen] == [(4, 4), (8, 8), (4, 4)]
    fixed = ApproximationConfig(tile=6).backend()
    assert not isinstance(fixed, HybridBackend)
    found = fixed.config_for(AttentionCall(tiny, tiny, tiny, layout=large))
    assert found is not None
    assert found.tile_shape == (6, 6)


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"layer_start": 4}, {}, "skipped_by_layer: layer double:3 is outside 4.."),
        ({"layer_end": 2}, {}, "skipped_by_layer: layer double:3 is outside 0..2"),
        ({"exact_above_sigma": 0.5}, {}, "sigma 0.5 is not below 0.5"),
        ({"layer_end": 9}, {"layer": None}, "the host does not name the layer"),
        ({}, {"layout": None}, "the host does not say where text and image tokens lie"),
        ({"only_if_faster": True}, {}, "as fast as exact attention at 596 keys"),
    ],
)
def test_gates(options: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    router = ApproximationConfig(**{"only_if_faster": False, **options}).router()
    call = _call(**changes)
    assert _ran(router, call) == {"native": 1}
    (said,) = router.report.declines()
    assert reason in said
    assert _ran(ApproximationConfig(only_if_faster=False).router(), _call()) == {"near_far": 1}


def test_without_a_prediction_attention_stays_exact() -> None:
    call = _call()
    wide = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    router = ApproximationConfig().router()
    assert _ran(router, wide) == {"native": 1}
    (said,) = router.report.declines()
    assert said.startswith("there is no prediction: the model of CPU")


def test_closed_gates_are_bit_equal() -> None:
    call = _call()
    router = ApproximationConfig(layer_start=9).router()
    assert router(call, _native).equal(_native(call))


def test_references_as_grids_are_cheaper() -> None:
    image, reference = TokenGrid(20, 16, 16), TokenGrid(276, 16, 16)
    layout = TokenLayout(532, ((0, 20),), (image,), (reference,))
    q, k, v = make_qkv(1, 2, 532, 32, logit_std=2.0, dtype=torch.float32, seed=4)
    call = AttentionCall(q, k, v, layout=layout)
    work = {}
    for name in ("exact", "grids"):
        backend = ApproximationConfig(references=name).backend()
        found = backend.work(call)
        assert found is not None
        work[name] = found
    assert work["grids"] != work["exact"]


def test_options_are_checked() -> None:
    assert ApproximationConfig(quality=1.0).exact
    assert not ApproximationConfig().exact
    with pytest.raises(ValueError, match=r"quality must be at most 1, got 1\.5"):
        ApproximationConfig(quality=1.5)
    with pytest.raises(ValueError, match="layer_start 5 must not be above layer_end 2"):
        ApproximationConfig(layer_start=5, layer_end=2)
    with pytest.raises(ValueError, match="method must be one of 'near-far', 'hybrid'"):
        ApproximationConfig(method="exact")
