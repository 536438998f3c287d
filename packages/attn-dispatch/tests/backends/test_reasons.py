from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_dispatch.backends.reasons import (
    Reason,
    refuse_cross,
    refuse_layer,
    refuse_layout,
    refuse_mask,
    refuse_shapes,
    refuse_sigma,
)
from attn_kernels import TokenGrid

GOOD = AttentionCall(*(torch.zeros(2, 3, tokens, width) for tokens, width in ((5, 8), (7, 8), (7, 6))))


def cut(name: str, *shape: int) -> AttentionCall:
    return replace(GOOD, **{name: torch.zeros(*shape)})


def test_the_words_of_reasons_stay() -> None:
    words = (
        "disabled unsupported_q_shape unsupported_kv_shape unsupported_qkv_shape heads_mismatch batch_mismatch "
        "head_dim_mismatch kv_dim_mismatch cross_attention_disabled below_min_tokens unsupported_mask_values "
        "unsupported_mask_shape unsupported_mask_per_query unsupported_mask_per_head sub_head_block_mismatch "
        "head_dim_too_large feature_dim_too_large denominator_invalid denominator_too_small skipped_by_sigma "
        "skipped_by_layer"
    )
    assert {str(reason) for reason in Reason} == set(words.split())
    assert len(Reason) == 21


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (GOOD, None),
        (cut("q", 2, 5, 8), Reason.Q_SHAPE),
        (cut("k", 2, 7, 8), Reason.KV_SHAPE),
        (cut("v", 2, 7, 8), Reason.KV_SHAPE),
        (AttentionCall(*(torch.zeros(2, 5, 24),) * 3), Reason.QKV_SHAPE),
        (cut("q", 2, 6, 5, 8), Reason.HEADS),
        (cut("v", 2, 1, 7, 8), Reason.HEADS),
        (cut("q", 1, 3, 5, 8), Reason.BATCH),
        (cut("k", 2, 3, 7, 16), Reason.HEAD_DIM),
        (cut("v", 2, 3, 8, 8), Reason.KV_DIM),
    ],
)
def test_shapes(call: AttentionCall, reason: Reason | None) -> None:
    answer = refuse_shapes(call)
    assert (answer is None) if reason is None else (answer or "").startswith(f"{reason}: ")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (GOOD, None),
        (replace(GOOD, key_mask=torch.ones(2, 7, dtype=torch.bool)), None),
        (replace(GOOD, key_mask=torch.ones(1, 7, dtype=torch.bool)), Reason.MASK_SHAPE),
        (replace(GOOD, key_mask=torch.ones(2, 5, dtype=torch.bool)), Reason.MASK_SHAPE),
        (replace(GOOD, attn_bias=torch.zeros(2, 3, 1, 7)), Reason.MASK_PER_HEAD),
        (replace(GOOD, attn_bias=torch.zeros(1, 1, 5, 7)), Reason.MASK_PER_QUERY),
        (replace(GOOD, attn_bias=torch.zeros(5, 7)), Reason.MASK_PER_QUERY),
        (replace(GOOD, attn_bias=torch.zeros(2, 1, 1, 7)), Reason.MASK_VALUES),
    ],
)
def test_masks(call: AttentionCall, reason: Reason | None) -> None:
    answer = refuse_mask(call)
    assert (answer is None) if reason is None else (answer or "").startswith(f"{reason}: ")


def test_cross_attention() -> None:
    assert refuse_cross(GOOD, allowed=True) is None
    assert refuse_cross(GOOD, allowed=False) == "cross_attention_disabled: 5 queries meet 7 keys"
    assert refuse_cross(cut("q", 2, 3, 7, 8), allowed=False) is None


@pytest.mark.parametrize(
    ("layer", "limits", "allowed"),
    [
        (LayerKey("single", 3), (-1, -1), True),
        (LayerKey("single", 3), (3, 3), True),
        (LayerKey("double", 2), (3, -1), False),
        (LayerKey("double", 4), (-1, 3), False),
        (LayerKey("double", 0), (-1, 0), True),
        (None, (3, 3), True),
    ],
)
def test_layers(layer: LayerKey | None, limits: tuple[int, int], allowed: bool) -> None:
    answer = refuse_layer(replace(GOOD, layer=layer), *limits)
    assert (answer is None) if allowed else (answer or "").startswith("skipped_by_layer: ")


@pytest.mark.parametrize(
    ("sigma", "limit", "allowed"), [(0.5, 0.5, True), (0.51, 0.5, False), (9.0, 0.0, True), (None, 0.5, True)]
)
def test_noise_levels(sigma: float | None, limit: float, allowed: bool) -> None:
    answer = refuse_sigma(replace(GOOD, step=None if sigma is None else StepContext(sigma)), limit)
    assert (answer is None) if allowed else (answer or "").startswith("skipped_by_sigma: ")


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (None, "the host does not say where text and image tokens lie"),
        (TokenLayout(5, (), (TokenGrid(0, 1, 5),)), "the layout describes 5 tokens, the call has 7"),
        (TokenLayout(7, ((0, 7),), ()), "the layout has no image grid"),
        (TokenLayout(7, ((0, 1),), (TokenGrid(1, 2, 3),)), None),
    ],
)
def test_layouts(layout: TokenLayout | None, reason: str | None) -> None:
    assert refuse_layout(replace(GOOD, layout=layout)) == reason
