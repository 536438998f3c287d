"""Where students are held to be faster; that nothing is slower there is measured by ``benchmarks/bench_comfyui.py``."""

from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, TokenLayout
from attn_kernels import TokenGrid
from ttr_distill import PRESETS, StudentBank, preset

LAYER = LayerKey("single", 0)
WORDS = 512


def _call(side: int, layer: LayerKey | None = LAYER) -> AttentionCall:
    """A picture of ``side * side`` tokens behind the words of Flux.2, two heads of width 128."""
    tokens = WORDS + side**2
    x = torch.empty(1, 2, tokens, 128)
    return AttentionCall(
        x, x, x, layer=layer, layout=TokenLayout(tokens, ((0, WORDS),), (TokenGrid(WORDS, side, side),))
    )


def _gate(host: Any, name: str) -> Any:
    from comfy_nodes.nodes.distill_gate import faster

    return faster(StudentBank.for_layers(preset(name), (LAYER,), 2, 128))


@pytest.mark.parametrize("name", PRESETS)
def test_no_student_pays_off_at_768_tokens(host: Any, name: str) -> None:
    reason = _gate(host, name)(_call(16))
    assert reason is not None
    assert "exact attention at 768" in reason


@pytest.mark.parametrize(
    ("name", "declined", "allowed"),
    [("near_far", 40, 56), ("hedgehog", 40, 64), ("local-kernel", 56, 96), ("hkr", 64, 96), ("hkr-joint", 96, 192)],
)
def test_students_pay_off_in_large_pictures(host: Any, name: str, declined: int, allowed: int) -> None:
    """Where a student was slower than exact attention on a CPU, and where it was faster."""
    gate = _gate(host, name)
    assert gate(_call(declined)) is not None
    assert all(gate(_call(side)) is None for side in range(allowed, 257, 16))


def test_what_is_not_known_does_not_pay_off(host: Any) -> None:
    gate = _gate(host, "hkr")
    for layer in (None, LayerKey("single", 9)):
        assert gate(_call(256, layer)) == "the cost of this call is not known"
