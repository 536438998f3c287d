"""A backend is available only after it has attended once, on this device, and was right.

A wheel for another torch, a kernel for another GPU, an option that is taken and ignored: an import finds none of them,
a small attention with a known answer finds all.
"""

from __future__ import annotations

import torch
from attn_kernels import softmax_attention
from torch import Tensor

from attn_dispatch.native.bindings import DenseKernel, VarlenKernel
from attn_dispatch.native.faults import Attempt
from attn_dispatch.native.kind import CallKind

# Odd, and well past a multiple of 64 and 128: a tail that is left out or not masked is a third of all. Batch and heads
# differ, so exchanged axes show.
_TOKENS, _CROSS_TOKENS, _BATCH, _HEADS = 183, 119, 2, 4
# Scores with standard deviation 2, as in a trained model; with less, the mean of v would be nearly right.
_LOGIT_STD = 2.0
_LENGTHS_Q = (5, 0, 130, 61, 9)
_LENGTHS_KV = (7, 3, 61, 200, 0)


def probe_dense(kernel: DenseKernel, kind: CallKind, tolerance: float, min_tokens: int = 0) -> str | None:
    """Attend once and compare with exact attention in float32.

    Waits for the device, once. Takes no random numbers from the process.

    Args:
        kernel: What to try.
        kind: What sort of call; see ``CallKind.probed``.
        tolerance: Largest relative L2 error.
        min_tokens: Fewest queries.

    Returns:
        ``None`` if the kernel is right, else one sentence.

    Raises:
        torch.OutOfMemoryError: There is no memory for so little.
    """
    queries = max(_TOKENS, min_tokens)
    keys = _CROSS_TOKENS if kind.cross else queries
    heads = _HEADS // 2 if kind.grouped else _HEADS
    generator = torch.Generator().manual_seed(0)
    sizes = ((_HEADS, queries, kind.width), (heads, keys, kind.width), (heads, keys, kind.value_width))
    q, k, v = (torch.randn(_BATCH, *size, generator=generator) for size in sizes)
    q = q * _LOGIT_STD
    mask = torch.rand(_BATCH, 1, queries, keys, generator=generator) > 0.5 if kind.masked else None
    if mask is not None:
        mask[..., 0] = True
        mask = mask.to(kind.device)
    q, k, v = (x.to(kind.device, kind.dtype) for x in (q, k, v))
    with _quiet(kind.device), torch.no_grad():
        before = [x.clone() for x in (q, k, v)]
        with Attempt() as attempt:
            output = kernel(q, k, v, mask, 0.0, None)
        if attempt.reason is not None:
            return attempt.reason
        repeats = _HEADS // heads
        wide = [x.to(torch.float32) for x in (before[0], *(y.repeat_interleave(repeats, 1) for y in before[1:]))]
        bias = None if mask is None else torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
        expected = softmax_attention(*wide, attn_bias=bias).out
        return _verdict(output, expected, kind, tolerance, zip((q, k, v), before, strict=True))


def probe_varlen(kernel: VarlenKernel, kind: CallKind, tolerance: float) -> str | None:
    """Attend once over packed sequences, empty ones among them, and compare with exact attention of each.

    Args:
        kernel: What to try.
        kind: What sort of call.
        tolerance: Largest relative L2 error.

    Returns:
        ``None`` if the kernel is right, else one sentence.
    """
    heads = _HEADS // 2 if kind.grouped else _HEADS
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (sum(_LENGTHS_Q), _HEADS, kind.width),
        (sum(_LENGTHS_KV), heads, kind.width),
        (sum(_LENGTHS_KV), heads, kind.value_width),
    )
    q, k, v = (torch.randn(*size, generator=generator) for size in sizes)
    q, k, v = (x.to(kind.device, kind.dtype) for x in (q * _LOGIT_STD, k, v))
    cu_q, cu_kv = (
        torch.tensor([0, *lengths]).cumsum(0).to(kind.device, torch.int32) for lengths in (_LENGTHS_Q, _LENGTHS_KV)
    )
    with _quiet(kind.device), torch.no_grad():
        before = [x.clone() for x in (q, k, v)]
        with Attempt() as attempt:
            output = kernel(q, k, v, cu_q, cu_kv, max(_LENGTHS_Q), max(_LENGTHS_KV), None)
        if attempt.reason is not None:
            return attempt.reason
        expected = _each_exactly(before, _HEADS // heads)
        return _verdict(output, expected, kind, tolerance, zip((q, k, v), before, strict=True))


def _each_exactly(qkv: list[Tensor], repeats: int) -> Tensor:
    q, k, v = qkv
    wide = [x.to(torch.float32) for x in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))]
    parts = []
    lengths = (_LENGTHS_Q, _LENGTHS_KV, _LENGTHS_KV)
    sequences = (torch.split(x, list(sizes)) for x, sizes in zip(wide, lengths, strict=True))
    for one_q, one_k, one_v in zip(*sequences, strict=True):
        if one_k.shape[0] == 0:
            # Nothing to attend to gives zeros, as a query whose keys are all masked.
            parts.append(one_q.new_zeros(*one_q.shape[:2], one_v.shape[2]))
        else:
            heads_first = (x.transpose(0, 1)[None] for x in (one_q, one_k, one_v))  # [1, H, N, D]
            parts.append(softmax_attention(*heads_first).out[0].transpose(0, 1))
    return torch.cat(parts)


def _quiet(device: torch.device) -> torch.autocast:
    """Return a context without autocast: the reference must stay in float32."""
    return torch.autocast(device.type, enabled=False)


def _verdict(
    output: Tensor, expected: Tensor, kind: CallKind, tolerance: float, inputs: zip[tuple[Tensor, Tensor]]
) -> str | None:
    if output.shape != expected.shape:
        return f"answered a probe with shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    if output.dtype != kind.dtype or output.device != expected.device:
        return f"answered a probe with {output.dtype} on {output.device}"
    if not all(torch.equal(now, then) for now, then in inputs):
        return "changed its inputs in a probe"
    error = float((output.to(torch.float32) - expected).norm() / expected.norm())
    # Written so that NaN fails.
    if not error <= tolerance:
        return f"gave wrong numbers in a probe: relative error {error:.2g}, at most {tolerance:g} is right"
    return None
