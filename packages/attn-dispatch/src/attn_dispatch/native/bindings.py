"""Each attention package behind one signature.

A binder takes an imported module and returns its kernels, or raises because the module lacks what it needs. Signatures
are those the packages document; nothing here decides whether a kernel may run (``catalog``) or is right (``probe``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

DenseKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None], Tensor]
"""``(q [B, H, Nq, D], k, v [B, Hk, Nk, D], mask, dropout_p, scale) -> [B, H, Nq, Dv]``; a new tensor, inputs kept."""

VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float | None], Tensor]
"""``(q [Tq, H, D], k, v [Tkv, Hk, D], cu_q [S+1], cu_kv [S+1], max_q, max_kv, scale) -> [Tq, H, Dv]``."""

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


@dataclass(frozen=True)
class Kernels:
    """What a package offers on this machine.

    Attributes:
        dense: Attention of ``[B, H, N, D]``.
        varlen: Attention of packed sequences; ``None`` if the package has none.
        masks: Whether ``dense`` takes a mask.
        label: Says more precisely than the catalog what runs; ``None`` if there is no more to say.
    """

    dense: DenseKernel
    varlen: VarlenKernel | None = None
    masks: bool = False
    label: str | None = None


Binder = Callable[[object], Kernels]
"""Makes kernels from an imported module; raises ``AttributeError`` if a function is missing."""


def _first(output: object) -> Tensor:
    """Return the output alone where a package answers with ``(output, logsumexp, ...)``."""
    tensor = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(tensor, Tensor):
        raise TypeError(f"attention returned {type(tensor).__name__}, not a tensor")
    return tensor


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor with its last axis contiguous, which every kernel needs."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tokens_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views ``[B, N, H, D]`` of ``[B, H, N, D]``."""
    return _rows(q.transpose(1, 2)), _rows(k.transpose(1, 2)), _rows(v.transpose(1, 2))


def bind_sage(module: object) -> Kernels:
    """Bind ``sageattention`` (Zhang et al., arXiv:2410.02367, arXiv:2411.10958)."""
    sageattn = getattr(module, "sageattn")  # noqa: B009
    # Some builds take a mask; in the others it would vanish in ``**kwargs``.
    masks = "attn_mask" in inspect.signature(sageattn).parameters

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        further = {} if mask is None else {"attn_mask": mask}
        return _first(
            sageattn(_rows(q), _rows(k), _rows(v), tensor_layout="HND", is_causal=False, sm_scale=scale, **further)
        )

    packed = getattr(module, "sageattn_varlen", None)

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
    ) -> Tensor:
        if packed is None:
            raise NotImplementedError("this sageattention has no sageattn_varlen")
        return _first(packed(_rows(q), _rows(k), _rows(v), cu_q, cu_kv, max_q, max_kv, is_causal=False, sm_scale=scale))

    # The second generation exports its CUDA kernels by name.
    label = None if hasattr(module, "sageattn_qk_int8_pv_fp16_cuda") else "SageAttention 1 (INT8)"
    return Kernels(dense, None if packed is None else varlen, masks, label)


def bind_sage3(module: object, name: str = "sageattn3_blackwell") -> Kernels:
    """Bind ``sageattn3`` (Zhang et al., arXiv:2505.11594)."""
    attend = getattr(module, name)

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        if scale is not None:
            # The kernel knows only 1 / sqrt(D).
            q = q * (scale * q.shape[-1] ** 0.5)
        # It subtracts the mean of k in place, so the caller's k must not be it.
        return _first(attend(_rows(q), k.clone(memory_format=torch.contiguous_format), _rows(v), is_causal=False))

    return Kernels(dense)


def _flash_dense(attend: Callable[..., object]) -> DenseKernel:
    """Wrap ``flash_attn_func`` as FlashAttention has it since version 3: tokens first, no dropout."""

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        return _first(attend(*_tokens_first(q, k, v), softmax_scale=scale, causal=False)).transpose(1, 2)

    return dense


def _flash_varlen(packed: Callable[..., object]) -> VarlenKernel:
    """Wrap ``flash_attn_varlen_func`` as FlashAttention has it up to version 3."""

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
    ) -> Tensor:
        return _first(packed(_rows(q), _rows(k), _rows(v), cu_q, cu_kv, max_q, max_kv, softmax_scale=scale))

    return varlen


def bind_flash2(module: object) -> Kernels:
    """Bind ``flash_attn`` 2 (Dao, arXiv:2307.08691)."""
    attend, packed = getattr(module, "flash_attn_func"), getattr(module, "flash_attn_varlen_func")  # noqa: B009

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        output = attend(*_tokens_first(q, k, v), dropout_p=dropout_p, softmax_scale=scale, causal=False)
        return _first(output).transpose(1, 2)

    return Kernels(dense, _flash_varlen(packed))


def bind_flash3(module: object) -> Kernels:
    """Bind ``flash_attn_interface`` (FlashAttention-3: Shah et al., arXiv:2407.08608) in 16 bits."""
    attend, packed = getattr(module, "flash_attn_func"), getattr(module, "flash_attn_varlen_func")  # noqa: B009
    return Kernels(_flash_dense(attend), _flash_varlen(packed))


def quantise_heads(x: Tensor, heads: int, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Quantise to float8 e4m3 with one scale for each group of heads.

    Args:
        x: ``[..., H, D]``.
        heads: How many groups the heads form; divides ``H``.
        axes: Axes of ``x`` over which a scale is shared, besides the heads of its group and D.

    Returns:
        The quantised tensor, shaped like ``x``, and float32 scales: ``x`` is about quantised times scale. The scales
        have shape ``[..., heads]`` without the shared axes.
    """
    grouped = x.reshape(*x.shape[:-2], heads, -1, x.shape[-1])
    peak = grouped.abs().amax(dim=(*axes, -2, -1), keepdim=True).to(torch.float32)
    # Zeros keep scale 1; the largest value lands on the largest float8, never beyond it.
    descale = torch.where(peak > 0, peak / _FP8_MAX, torch.ones_like(peak))
    quantised = (grouped.to(torch.float32) / descale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
    squeezed = descale.squeeze(-1).squeeze(-1)
    for axis in sorted(axes, reverse=True):
        squeezed = squeezed.squeeze(axis)
    return quantised.flatten(-3, -2), squeezed


def bind_flash3_fp8(module: object) -> Kernels:
    """Bind FlashAttention-3 in float8: q, k and v are quantised per key head and handed on with their scales."""
    attend, packed = getattr(module, "flash_attn_func"), getattr(module, "flash_attn_varlen_func")  # noqa: B009
    if "q_descale" not in inspect.signature(attend).parameters:
        raise AttributeError("flash_attn_func takes no q_descale, so it has no FP8")

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        heads = k.shape[1]
        (q8, qd), (k8, kd), (v8, vd) = (quantise_heads(x, heads, (1,)) for x in _tokens_first(q, k, v))
        output = attend(
            q8, k8, v8, softmax_scale=scale, causal=False, q_descale=qd, k_descale=kd, v_descale=vd
        )  # bfloat16 [B, Nq, H, D]
        return _first(output).to(q.dtype).transpose(1, 2)

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
    ) -> Tensor:
        heads, sequences = k.shape[1], cu_q.shape[0] - 1
        (q8, qd), (k8, kd), (v8, vd) = (quantise_heads(x, heads, (0,)) for x in (q, k, v))
        # One scale per head over all sequences: a scale per sequence would need its bounds on the host.
        qd, kd, vd = (one.expand(sequences, heads).contiguous() for one in (qd, kd, vd))
        output = packed(
            q8,
            k8,
            v8,
            cu_q,
            cu_kv,
            max_q,
            max_kv,
            softmax_scale=scale,
            q_descale=qd,
            k_descale=kd,
            v_descale=vd,
        )
        return _first(output).to(q.dtype)

    return Kernels(dense, varlen)


def bind_flash4(module: object) -> Kernels:
    """Bind ``flash_attn.cute`` (FlashAttention-4)."""
    attend, packed = getattr(module, "flash_attn_func"), getattr(module, "flash_attn_varlen_func")  # noqa: B009

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
    ) -> Tensor:
        bounds = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_kv, "max_seqlen_q": max_q, "max_seqlen_k": max_kv}
        return _first(packed(_rows(q), _rows(k), _rows(v), softmax_scale=scale, causal=False, **bounds))

    return Kernels(_flash_dense(attend), varlen)


def bind_flash4_fp8(module: object) -> Kernels:
    """Bind ``flash_attn.cute`` in float8, which its public function takes without scales.

    Queries and keys are rounded as they are (float8 e4m3 has 3 bits of mantissa at any size from 2^-6 to 448; after
    QK-norm they lie well inside), values are scaled per key head and the output is scaled back.
    """
    attend = getattr(module, "flash_attn_func")  # noqa: B009

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        queries, keys, values = _tokens_first(q, k, v)
        q8, k8 = (x.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8) for x in (queries, keys))
        v8, descale = quantise_heads(values, k.shape[1], (1,))
        output = _first(attend(q8, k8, v8, softmax_scale=scale, causal=False)).transpose(1, 2)
        back = descale.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :, None, None]
        return (output.to(torch.float32) * back).to(q.dtype)

    return Kernels(dense)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to the scores.

    Args:
        mask: Any shape; bool (True = keep) or float, which is returned in ``dtype``.
        dtype: Dtype of the scores.

    Returns:
        The same shape.
    """
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def aligned_bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Make the additive mask of kernels that want its rows aligned to 16 bytes.

    Args:
        mask: Broadcastable to ``[B, H, Nq, Nk]``; bool (True = keep) or float (added to the scaled scores).
        q: ``[B, H, Nq, D]``.
        k: ``[B, Hk, Nk, D]``.

    Returns:
        ``[B, H, Nq, Nk]`` in the dtype of q, broadcast over batch and heads where the mask is.
    """
    wide = mask[(None,) * (4 - mask.ndim)]
    batch, heads, rows, columns = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    room = wide.new_empty((*wide.shape[:2], rows, -(-columns // 8) * 8), dtype=q.dtype)
    bias = room[..., :columns]
    bias.copy_(additive(wide, q.dtype))
    return bias.expand(batch, heads, rows, columns)


def bind_xformers(module: object) -> Kernels:
    """Bind ``xformers.ops.memory_efficient_attention`` (Rabe and Staats, arXiv:2112.05682)."""
    attend = getattr(module, "memory_efficient_attention")  # noqa: B009
    blocks = getattr(getattr(module, "fmha", None), "BlockDiagonalMask", None)

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        bias = None if mask is None else aligned_bias(mask, q, k)
        return _first(attend(*_tokens_first(q, k, v), attn_bias=bias, p=dropout_p, scale=scale)).transpose(1, 2)

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
    ) -> Tensor:
        if blocks is None:
            raise NotImplementedError("this xformers has no fmha.BlockDiagonalMask")
        # It wants the lengths on the host: one copy for both.
        bounds = torch.stack((cu_q, cu_kv))
        lengths_q, lengths_kv = (bounds[:, 1:] - bounds[:, :-1]).tolist()
        bias = blocks.from_seqlens(lengths_q, lengths_kv)
        return _first(attend(q[None], k[None], v[None], attn_bias=bias, scale=scale))[0]

    return Kernels(dense, None if blocks is None else varlen, masks=True)


def bind_comfy_kitchen(module: object) -> Kernels:
    """Bind ``comfy_kitchen.int8_attention``."""
    attend = getattr(module, "int8_attention")  # noqa: B009

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        return _first(attend(_rows(q), _rows(k), _rows(v), scale=scale, attn_mask=mask))

    return Kernels(dense, masks=True)


def bind_flex(module: object) -> Kernels:
    """Bind ``torch.nn.attention.flex_attention`` (Dong et al., arXiv:2412.05496), compiled.

    Uncompiled it writes out all scores, which would be no gain.
    """
    attend: Callable[..., object] = torch.compile(getattr(module, "flex_attention"), dynamic=True)  # noqa: B009

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        return _first(attend(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]))

    return Kernels(dense)


def _operator(module: object, name: str) -> Callable[..., object]:
    """Return an ATen operator. Called by name, it can neither fall back nor change a switch of the process."""
    operator: Callable[..., object] = getattr(getattr(getattr(module, "ops"), "aten"), name)  # noqa: B009
    return operator


def bind_sdpa_math(module: object) -> Kernels:
    """Bind SDPA's plain form, which writes out all scores."""
    attend = _operator(module, "_scaled_dot_product_attention_math")

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        bias = None if mask is None else additive(mask, q.dtype)
        return _first(attend(q, k, v, bias, dropout_p, False, scale=scale, enable_gqa=gqa))

    return Kernels(dense, masks=True)


def bind_sdpa_flash(module: object) -> Kernels:
    """Bind the FlashAttention-2 inside torch."""
    attend = _operator(module, "_scaled_dot_product_flash_attention")

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        return _first(attend(_rows(q), _rows(k), _rows(v), dropout_p, False, False, scale=scale))

    return Kernels(dense)


def bind_sdpa_flash_cpu(module: object) -> Kernels:
    """Bind the flash attention for processors inside torch."""
    attend = _operator(module, "_scaled_dot_product_flash_attention_for_cpu")

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        bias = None if mask is None else aligned_bias(mask, q, k)
        return _first(attend(_rows(q), _rows(k), _rows(v), dropout_p, False, attn_mask=bias, scale=scale))

    return Kernels(dense, masks=True)


def _bind_sdpa_biased(module: object, name: str, further: tuple[bool, ...]) -> Kernels:
    attend = _operator(module, name)

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        bias = None if mask is None else aligned_bias(mask, q, k)
        # The logsumexp is what the backward pass needs.
        lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return _first(attend(_rows(q), _rows(k), _rows(v), bias, lse, dropout_p, False, *further, scale=scale))

    return Kernels(dense, masks=True)


bind_sdpa_efficient: Binder = partial(_bind_sdpa_biased, name="_scaled_dot_product_efficient_attention", further=())
"""Bind the memory-efficient attention inside torch."""

bind_sdpa_cudnn: Binder = partial(_bind_sdpa_biased, name="_scaled_dot_product_cudnn_attention", further=(False,))
"""Bind cuDNN's attention inside torch."""
