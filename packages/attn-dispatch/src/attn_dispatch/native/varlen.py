"""Packed sequences without a package for them: what torch itself offers, and one call of SDPA after the other.

No form builds a mask over all tokens. ``attend_each`` learns the bounds of the sequences by one copy to the host; the
other forms need none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_dispatch.native.arch import Arch, Tier
from attn_dispatch.native.bindings import VarlenKernel
from attn_dispatch.native.kind import CallKind


@dataclass(frozen=True)
class PackedForm:
    """One of torch's own ways to attend over packed sequences.

    Attributes:
        key: Unique name.
        label: What runs, in words.
        kernel: Runs it.
        tiers: Devices it runs on.
        dtypes: Dtypes it takes.
        grouped: Whether k and v may have fewer heads than q.
        value_width: Whether v may have another width than q and k.
        tolerance: Largest relative L2 error of a probe.
    """

    key: str
    label: str
    kernel: VarlenKernel
    tiers: frozenset[Tier]
    dtypes: tuple[torch.dtype, ...]
    grouped: bool = False
    value_width: bool = False
    tolerance: float = 0.02

    def refuses(self, kind: CallKind, arch: Arch) -> str | None:
        """Say why this form cannot answer such calls; ``None`` if it may."""
        if arch.tier not in self.tiers:
            return f"does not run on {arch}"
        if kind.dtype not in self.dtypes:
            return f"does not take {str(kind.dtype).removeprefix('torch.')}"
        if kind.grouped and not self.grouped:
            return "takes no grouped heads"
        if kind.value_width != kind.width and not self.value_width:
            return f"takes no values of another width ({kind.value_width}) than the keys ({kind.width})"
        return None


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor) -> None:
    """Check packed sequences, as far as that needs no values.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tkv, Hk, D]``.
        v: ``[Tkv, Hk, Dv]``.
        cu_seqlens_q: ``[S + 1]``, where each sequence of queries starts, and where the last one ends.
        cu_seqlens_kv: ``[S + 1]``, the same for keys and values.

    Raises:
        ValueError: Wrong rank, sizes or dtype.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be packed as [T, H, D], got shape {tuple(tensor.shape)}")
    if q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k and v do not fit each other: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if bounds.ndim != 1 or bounds.shape[0] == 0 or bounds.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be [S + 1] of int32, got {tuple(bounds.shape)} of {bounds.dtype}")
    if cu_seqlens_q.shape != cu_seqlens_kv.shape or cu_seqlens_q.device != cu_seqlens_kv.device:
        raise ValueError(
            f"cu_seqlens_q {tuple(cu_seqlens_q.shape)} and cu_seqlens_kv {tuple(cu_seqlens_kv.shape)} "
            f"must name the same number of sequences on one device, got {cu_seqlens_q.device}, {cu_seqlens_kv.device}"
        )


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
) -> Tensor:
    """Attend sequence by sequence with SDPA; neighbours of equal lengths go in one call.

    Copies the bounds to the host once, all together. Queries without keys get zeros.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tkv, Hk, D]``; ``Hk`` divides ``H``.
        v: ``[Tkv, Hk, Dv]``.
        cu_q: ``[S + 1]`` bounds of the queries.
        cu_kv: ``[S + 1]`` bounds of the keys.
        max_q: Most queries of a sequence; not needed here.
        max_kv: Most keys of a sequence; not needed here.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.

    Returns:
        ``[Tq, H, Dv]``.

    Raises:
        ValueError: The bounds do not rise from 0 to the number of tokens.
    """
    bounds_q, bounds_kv = torch.stack((cu_q, cu_kv)).tolist()
    for name, bounds, tokens in (("cu_seqlens_q", bounds_q, q.shape[0]), ("cu_seqlens_kv", bounds_kv, k.shape[0])):
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            raise ValueError(f"{name} must rise from 0 to the {tokens} tokens, got {_shortened(bounds)}")
    parts = []
    start, count = 0, len(bounds_q) - 1
    while start < count:
        rows, columns = bounds_q[start + 1] - bounds_q[start], bounds_kv[start + 1] - bounds_kv[start]
        stop = start + 1
        while stop < count and (bounds_q[stop + 1] - bounds_q[stop], bounds_kv[stop + 1] - bounds_kv[stop]) == (
            rows,
            columns,
        ):
            stop += 1
        if rows:
            some_q, some_k, some_v = (
                x[bounds[start] : bounds[stop]].reshape(stop - start, length, *x.shape[1:]).transpose(1, 2)
                for x, bounds, length in ((q, bounds_q, rows), (k, bounds_kv, columns), (v, bounds_kv, columns))
            )
            parts.append(_attend_some(some_q, some_k, some_v, scale))
        start = stop
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], v.shape[2])


def _attend_some(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attend sequences of equal lengths ``[S, H, N, D]``; answer packed ``[S * Nq, H, Dv]``."""
    if k.shape[2] == 0:
        # What SDPA makes of no keys at all is not promised for every device.
        return q.new_zeros(q.shape[0] * q.shape[2], q.shape[1], v.shape[3])
    output = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return output.transpose(1, 2).flatten(0, 1)


def _shortened(bounds: list[int]) -> str:
    return str(bounds) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:4]))}, …, {bounds[-1]}]"


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
) -> Tensor:
    """Attend with ``torch.nn.attention.varlen``, which torch has from 2.10 on; arguments: see ``attend_each``."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(q, k, v, cu_q, cu_kv, max_q, max_kv, scale=scale)
    if not isinstance(output, Tensor):
        raise TypeError("varlen_attn returned more than its output")
    return output


def attend_nested(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int, scale: float | None
) -> Tensor:
    """Attend over nested tensors of torch's jagged layout; arguments: see ``attend_each``."""

    def nest(x: Tensor, bounds: Tensor, longest: int) -> Tensor:
        # The least length is given because torch would otherwise fetch it from the device; kernels do not read it.
        return torch.nested.nested_tensor_from_jagged(x, bounds, min_seqlen=1, max_seqlen=longest).transpose(1, 2)

    output = scaled_dot_product_attention(
        nest(q, cu_q, max_q), nest(k, cu_kv, max_kv), nest(v, cu_kv, max_kv), scale=scale
    )
    packed = output.transpose(1, 2).values()  # type: ignore[no-untyped-call]
    if not isinstance(packed, Tensor):
        raise TypeError("a nested tensor has no values")
    return packed


_HALF = (torch.float16, torch.bfloat16)
_MODERN = frozenset({Tier.AMPERE, Tier.HOPPER, Tier.BLACKWELL})

PACKED_FORMS: tuple[PackedForm, ...] = (
    PackedForm("varlen_attn", "PyTorch varlen_attn", attend_varlen, _MODERN, _HALF),
    PackedForm(
        "nested",
        "PyTorch SDPA over nested tensors",
        attend_nested,
        _MODERN | {Tier.OLDER, Tier.ROCM},
        (*_HALF, torch.float32),
    ),
)
"""Tried in this order, after the packages and before ``attend_each``."""
