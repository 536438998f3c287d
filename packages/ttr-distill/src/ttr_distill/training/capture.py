"""Turns an attention call and the teacher's answer into a replay sample."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from attn_dispatch import AttentionCall, LayerKey, TokenLayout
from torch import Tensor

from ttr_distill.seeding import stream
from ttr_distill.training.offload import HostCopies
from ttr_distill.training.replay import Queries, ReplaySample

StorageDtype = Literal["float32", "bfloat16", "float16"]
_FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class CaptureConfig:
    """What is kept of a call.

    Attributes:
        query_cap: At most so many queries to train on, drawn at random.
        heldout_cap: At most so many queries to measure on.
        heldout_share: Share of the token positions that are never trained on; the measured ones come from them.
        storage_dtype: Floats are kept in it. A tensor too large for float16 is kept in bfloat16.
        offload: Keep samples in host memory, else on the device of the call.
        query_draws: So many samples are made of one call. Each has its own queries; keys and values are stored once.
    """

    query_cap: int = 128
    heldout_cap: int = 64
    heldout_share: float = 0.125
    storage_dtype: StorageDtype = "float16"
    offload: bool = True
    query_draws: int = 1

    def __post_init__(self) -> None:
        if self.query_cap < 1 or self.heldout_cap < 1:
            raise ValueError(f"query_cap and heldout_cap must be at least 1, got {self.query_cap}, {self.heldout_cap}")
        if self.query_draws < 1:
            raise ValueError(f"query_draws must be at least 1, got {self.query_draws}")
        if not 0.0 < self.heldout_share < 1.0:
            raise ValueError(f"heldout_share must be between 0 and 1, got {self.heldout_share}")
        if self.storage_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"storage_dtype must be float32, bfloat16 or float16, got {self.storage_dtype!r}")


def capture(
    call: AttentionCall,
    target: Tensor,
    layer: LayerKey,
    layout: TokenLayout,
    selection: Tensor | None,
    config: CaptureConfig,
    *,
    seed: int,
    generator: torch.Generator,
) -> ReplaySample | None:
    """Copy a call into a sample; call it inside ``training_mode``.

    Args:
        call: A self-attention call, also one of inference tensors.
        target: ``[B, H, N, Dv]``, the teacher's answer.
        layer: Which layer.
        layout: Where text and image tokens lie.
        selection: ``[B, H, T, top_k]`` int64, what the student chose for the whole call; ``None`` if it does not.
        config: What is kept.
        seed: Decides which positions are never trained on, for every call of this length alike.
        generator: Draws the queries.

    Returns:
        The sample, or ``None`` if the call holds a number that is not finite, or a single token.
    """
    tokens = call.q.shape[2]
    if tokens < 2:
        return None
    dtypes = _storage_dtypes((call.q, call.k, call.v, target), getattr(torch, config.storage_dtype))
    if dtypes is None:
        return None
    trainable, heldout = split_positions(tokens, config.heldout_share, seed)
    copies = HostCopies(call.k.device, offload=config.offload)
    q_dtype, k_dtype, v_dtype, target_dtype = dtypes

    def some(pool: Tensor, cap: int) -> Queries:
        return _drawn(call, target, pool, cap, copies, q_dtype, target_dtype, generator)

    return ReplaySample(
        layer=layer,
        k=copies.take(call.k, k_dtype),
        v=copies.take(call.v, v_dtype),
        train=some(trainable, config.query_cap),
        heldout=some(heldout, config.heldout_cap),
        layout=layout,
        scale=call.scale,
        step=call.step,
        key_mask=None if call.key_mask is None else copies.take(call.key_mask),
        selection=None if selection is None else copies.take(selection),
        arrival=copies.arrival(),
    )


def redraw(
    sample: ReplaySample,
    call: AttentionCall,
    target: Tensor,
    config: CaptureConfig,
    *,
    seed: int,
    generator: torch.Generator,
) -> ReplaySample:
    """Make another sample of a captured call: other training queries, everything else shared with the first.

    Args:
        sample: From ``capture`` of the same call.
        call: The call.
        target: ``[B, H, N, Dv]``, the teacher's answer.
        config: What is kept.
        seed: As given to ``capture``.
        generator: Draws the queries.
    """
    trainable, _ = split_positions(call.q.shape[2], config.heldout_share, seed)
    copies = HostCopies(call.k.device, offload=config.offload)
    dtypes = sample.train.q.dtype, sample.train.target.dtype
    train = _drawn(call, target, trainable, config.query_cap, copies, *dtypes, generator)
    return replace(sample, train=train, arrival=copies.arrival().also(sample.arrival))


def _storage_dtypes(sources: tuple[Tensor, ...], wanted: torch.dtype) -> list[torch.dtype] | None:
    """Choose how each tensor is stored; ``None`` if one holds a number that is not finite."""
    # aminmax reads the tensor without a copy of its size, and NaN reaches the result.
    extremes = [torch.stack(torch.aminmax(source.detach())).float() for source in sources]
    peaks = torch.stack(extremes).abs().amax(dim=1).tolist()
    if not all(peak < float("inf") for peak in peaks):
        return None
    return [torch.bfloat16 if wanted is torch.float16 and peak > _FLOAT16_LARGEST else wanted for peak in peaks]


def _drawn(
    call: AttentionCall,
    target: Tensor,
    pool: Tensor,
    cap: int,
    copies: HostCopies,
    q_dtype: torch.dtype,
    target_dtype: torch.dtype,
    generator: torch.Generator,
) -> Queries:
    order = torch.randperm(pool.numel(), generator=generator)[:cap]
    positions = pool[order].sort().values
    at = positions.to(call.q.device)
    kept = (
        copies.take(call.q.index_select(2, at), q_dtype),
        copies.take(target.index_select(2, at), target_dtype),
    )
    return Queries(*kept, positions.to(copies.device))


@lru_cache(maxsize=64)
def split_positions(tokens: int, heldout_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the token positions of a sequence into those that may be trained on and those that never are.

    Args:
        tokens: Number of tokens, at least 2.
        heldout_share: Share of the second part; at least one token, at most all but one.
        seed: Decides which.

    Returns:
        Two disjoint sorted int64 tensors that together hold every position.
    """
    order = torch.randperm(tokens, generator=stream(seed, "heldout", tokens))
    count = min(tokens - 1, max(1, round(tokens * heldout_share)))
    return order[count:].sort().values, order[:count].sort().values
