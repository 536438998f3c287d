"""Why a backend that works on heads and keys as such cannot answer a call.

A reason begins with a word that stays the same from release to release, then says what was the matter. Nothing here
reads tensor values.
"""

from __future__ import annotations

from enum import StrEnum

from attn_dispatch.call import AttentionCall


class Reason(StrEnum):
    """First words of reasons."""

    DISABLED = "disabled"
    Q_SHAPE = "unsupported_q_shape"
    KV_SHAPE = "unsupported_kv_shape"
    QKV_SHAPE = "unsupported_qkv_shape"
    HEADS = "heads_mismatch"
    BATCH = "batch_mismatch"
    HEAD_DIM = "head_dim_mismatch"
    KV_DIM = "kv_dim_mismatch"
    CROSS = "cross_attention_disabled"
    MIN_TOKENS = "below_min_tokens"
    MASK_VALUES = "unsupported_mask_values"
    MASK_SHAPE = "unsupported_mask_shape"
    MASK_PER_QUERY = "unsupported_mask_per_query"
    MASK_PER_HEAD = "unsupported_mask_per_head"
    SUB_HEADS = "sub_head_block_mismatch"
    HEAD_DIM_LARGE = "head_dim_too_large"
    FEATURE_DIM_LARGE = "feature_dim_too_large"
    DENOMINATOR_INVALID = "denominator_invalid"
    DENOMINATOR_SMALL = "denominator_too_small"
    SIGMA = "skipped_by_sigma"
    LAYER = "skipped_by_layer"

    def because(self, sentence: str) -> str:
        """Return ``"<word>: <sentence>"``."""
        return f"{self.value}: {sentence}"


def refuse_shapes(call: AttentionCall) -> str | None:
    """Say why q, k and v do not belong together as ``[B, H, N, D]``, or ``None``; Dv and Nq are free."""
    q, k, v = call.q, call.k, call.v
    four = [tensor.ndim == 4 for tensor in (q, k, v)]
    if not any(four):
        return Reason.QKV_SHAPE.because("q, k and v must be [B, H, N, D]")
    if not four[0]:
        return Reason.Q_SHAPE.because(f"q must be [B, H, N, D], got {q.ndim} dimensions")
    if not all(four):
        return Reason.KV_SHAPE.because(f"k and v must be [B, H, N, D], got {k.ndim} and {v.ndim} dimensions")
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        return Reason.HEADS.because(f"q, k and v have {q.shape[1]}, {k.shape[1]} and {v.shape[1]} heads")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return Reason.BATCH.because(f"q, k and v have batches of {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if q.shape[3] != k.shape[3]:
        return Reason.HEAD_DIM.because(f"heads of q and k are {q.shape[3]} and {k.shape[3]} wide")
    if k.shape[2] != v.shape[2]:
        return Reason.KV_DIM.because(f"k and v have {k.shape[2]} and {v.shape[2]} tokens")
    if not k.shape[2]:
        return Reason.KV_SHAPE.because("there are no keys")
    return None


def refuse_mask(call: AttentionCall) -> str | None:
    """Say why the call's mask is not one mask of keys for all heads and queries, or ``None``."""
    mask, bias = call.key_mask, call.attn_bias
    if mask is not None and tuple(mask.shape) != (call.k.shape[0], call.k.shape[2]):
        return Reason.MASK_SHAPE.because(f"the key mask must be [B, Nk], got {list(mask.shape)}")
    if bias is None:
        return None
    if bias.ndim >= 3 and bias.shape[-3] > 1:
        return Reason.MASK_PER_HEAD.because("the mask differs between heads")
    if bias.ndim >= 2 and bias.shape[-2] > 1:
        return Reason.MASK_PER_QUERY.because("the mask differs between queries")
    return Reason.MASK_VALUES.because("a bias is added to the scores; only masks of keys are understood")


def refuse_layout(call: AttentionCall) -> str | None:
    """Say why the call's layout does not name the image tokens among its keys, or ``None``."""
    layout = call.layout
    if layout is None:
        return "the host does not say where text and image tokens lie"
    if layout.length != call.k.shape[2]:
        return f"the layout describes {layout.length} tokens, the call has {call.k.shape[2]}"
    return None if layout.grids else "the layout has no image grid"


def refuse_cross(call: AttentionCall, allowed: bool) -> str | None:
    """Say why another number of keys than queries is not allowed, or ``None``."""
    if allowed or call.q.shape[2] == call.k.shape[2]:
        return None
    return Reason.CROSS.because(f"{call.q.shape[2]} queries meet {call.k.shape[2]} keys")


def refuse_layer(call: AttentionCall, first: int, last: int) -> str | None:
    """Say why the call's layer is not in ``first..last``, or ``None``.

    Args:
        call: The call; a layer without a name is allowed.
        first: First allowed index within a stream; below 0 = no limit.
        last: Last allowed index within a stream; below 0 = no limit.
    """
    if call.layer is None:
        return None
    index = call.layer.index
    if (first >= 0 and index < first) or (last >= 0 and index > last):
        return Reason.LAYER.because(
            f"layer {call.layer} is outside {first if first >= 0 else 0}..{last if last >= 0 else ''}"
        )
    return None


def refuse_sigma(call: AttentionCall, limit: float) -> str | None:
    """Say why the call's noise level is above ``limit``, or ``None``; 0 = no limit, an unknown level is allowed."""
    if limit <= 0 or call.step is None or call.step.sigma <= limit:
        return None
    return Reason.SIGMA.because(f"sigma {call.step.sigma:.4g} is above {limit:.4g}")
