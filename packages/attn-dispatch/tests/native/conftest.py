"""Attention packages that are not here, as fakes: the real signatures, computed with SDPA on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from attn_dispatch.native import Arch, Dispatcher, Tier
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FP8 = torch.float8_e4m3fn


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """SDPA of ``[B, H, N, D]`` with the head grouping that the packages infer."""
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    """The same of ``[B, N, H, D]``."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), bias, scale).transpose(1, 2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None = None) -> Tensor:
    """One sequence after the other; zeros where there are no keys."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    output = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        if d > c:
            output[a:b] = attend_rows(q[None, a:b], k[None, c:d], v[None, c:d], scale)[0]
    return output


class FakePackages:
    """Looks modules up as ``import_module`` does; ``missing``, ``broken`` and ``wrap`` change what is found.

    Attributes:
        calls: How often each module's dense attention ran.
        packed: How often each module's packed attention ran.
        lookups: How often each module was asked for.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.packed: Counter[str] = Counter()
        self.lookups: Counter[str] = Counter()
        self.broken: dict[str, BaseException] = {}
        self.before: dict[str, Callable[[Tensor], None]] = {}
        self.after: dict[str, Callable[[Tensor], Tensor]] = {}
        self.modules = {
            "sageattention": self.sageattention(),
            "sageattn3": self.sageattn3(),
            "comfy_kitchen": self.comfy_kitchen(),
            "flash_attn": self.flash_attn(),
            "flash_attn_interface": self.flash_attn_interface(),
            "flash_attn.cute": self.flash_attn_cute(),
            "xformers.ops": self.xformers_ops(),
            "torch": torch,
        }

    def only(self, *names: str) -> FakePackages:
        self.modules = {name: self.modules[name] for name in names}
        return self

    def __call__(self, name: str) -> object:
        self.lookups[name] += 1
        if name in self.broken:
            raise self.broken[name]
        if name not in self.modules:
            top = name.partition(".")[0]
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
        return self.modules[name]

    def ran(self, name: str, q: Tensor, width: Tensor | None = None) -> None:
        """Count a call; ``before`` may refuse it."""
        self.calls[name] += 1
        if name in self.before:
            self.before[name](q)

    def done(self, name: str, output: Tensor) -> Tensor:
        return self.after[name](output) if name in self.after else output

    def sageattention(self) -> SimpleNamespace:
        def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
            assert tensor_layout == "HND"
            assert not is_causal
            assert q.dtype in (torch.float16, torch.bfloat16)
            self.ran("sageattention", q)
            return self.done("sageattention", attend(q, k, v, None, sm_scale))

        def sageattn_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None,
            smooth_k=True, **kwargs,
        ):  # fmt: skip
            self.packed["sageattention"] += 1
            return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, sm_scale)

        return SimpleNamespace(
            sageattn=sageattn, sageattn_varlen=sageattn_varlen, sageattn_qk_int8_pv_fp16_cuda=sageattn
        )

    def sageattn3(self) -> SimpleNamespace:
        def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
            self.ran("sageattn3", q)
            k -= k.mean(dim=-2, keepdim=True)
            return self.done("sageattn3", attend(q, k, v))

        return SimpleNamespace(sageattn3_blackwell=sageattn3_blackwell)

    def comfy_kitchen(self) -> SimpleNamespace:
        def int8_attention(q, k, v, *, scale=None, attn_mask=None):
            self.ran("comfy_kitchen", q)
            return self.done("comfy_kitchen", attend(q, k, v, attn_mask, scale))

        return SimpleNamespace(int8_attention=int8_attention)

    def flash_attn(self) -> SimpleNamespace:
        def flash_attn_func(
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False,
        ):  # fmt: skip
            assert q.dtype in (torch.float16, torch.bfloat16)
            self.ran("flash_attn", q)
            return self.done("flash_attn", attend_rows(q, k, v, softmax_scale))

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None,
        ):  # fmt: skip
            self.packed["flash_attn"] += 1
            return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

        return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)

    def flash_attn_interface(self) -> SimpleNamespace:
        def exact(q, k, v, q_descale, k_descale, v_descale, shape, axis):
            if q.dtype is not FP8:
                assert q_descale is None
                return q, k, v, q.dtype
            assert k.dtype is v.dtype is FP8
            groups = q.shape[-2] // k.shape[-2]
            wide = []
            for x, scale, repeats in ((q, q_descale, groups), (k, k_descale, 1), (v, v_descale, 1)):
                assert tuple(scale.shape) == shape
                assert scale.dtype is torch.float32
                per_head = scale.repeat_interleave(repeats, 1)
                per_head = per_head[:1] if axis == 0 else per_head[:, None]
                wide.append((x.float() * per_head[..., None]).to(torch.bfloat16))
            return *wide, torch.bfloat16

        def flash_attn_func(
            q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            self.ran("flash_attn_interface", q)
            shape = (q.shape[0], k.shape[2])
            q, k, v, dtype = exact(q, k, v, q_descale, k_descale, v_descale, shape, 1)
            return self.done("flash_attn_interface", attend_rows(q, k, v, softmax_scale).to(dtype))

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            self.packed["flash_attn_interface"] += 1
            shape = (cu_seqlens_q.shape[0] - 1, k.shape[1])
            q, k, v, dtype = exact(q, k, v, q_descale, k_descale, v_descale, shape, 0)
            return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale).to(dtype)

        return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)

    def flash_attn_cute(self) -> SimpleNamespace:
        def wide(x):
            return x.to(torch.bfloat16) if x.dtype is FP8 else x

        def flash_attn_func(
            q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
            learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
            score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
            block_sparse_tensors_bwd=None, return_lse=False,
        ):  # fmt: skip
            self.ran("flash_attn.cute", q)
            return self.done("flash_attn.cute", attend_rows(wide(q), wide(k), wide(v), softmax_scale)), None

        def flash_attn_varlen_func(
            q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
            softmax_scale=None, causal=False, **kwargs,
        ):  # fmt: skip
            assert not kwargs
            self.packed["flash_attn.cute"] += 1
            return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None

        return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)

    def xformers_ops(self) -> SimpleNamespace:
        class BlockDiagonalMask:
            def __init__(self, q_seqlen, kv_seqlen):
                assert all(isinstance(one, int) for one in (*q_seqlen, *kv_seqlen))
                self.bounds = [torch.tensor([0, *one]).cumsum(0).int() for one in (q_seqlen, kv_seqlen)]

            @classmethod
            def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
                return cls(q_seqlen, kv_seqlen)

        def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
            if isinstance(attn_bias, BlockDiagonalMask):
                self.packed["xformers.ops"] += 1
                return attend_packed(query[0], key[0], value[0], *attn_bias.bounds, scale)[None]
            self.ran("xformers.ops", query)
            if attn_bias is not None:
                assert attn_bias.dtype == query.dtype
                assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
                assert attn_bias.stride(-2) % 8 == 0
            return self.done("xformers.ops", attend_rows(query, key, value, scale, attn_bias))

        return SimpleNamespace(
            memory_efficient_attention=memory_efficient_attention,
            fmha=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
        )


@pytest.fixture
def packages() -> FakePackages:
    return FakePackages()


ARCHES = {
    "blackwell": Arch.of_capability(12, 0),
    "datacentre blackwell": Arch.of_capability(10, 0),
    "hopper": Arch.of_capability(9, 0),
    "ada": Arch.of_capability(8, 9),
    "turing": Arch.of_capability(7, 5),
    "rocm": Arch(Tier.ROCM),
    "cpu": Arch(Tier.CPU),
}


@pytest.fixture
def on(packages: FakePackages) -> Callable[..., Dispatcher]:
    """Make a dispatcher that takes the CPU for another device."""

    def make(arch: str, **kwargs: object) -> Dispatcher:
        return Dispatcher(packages, detect=lambda device: ARCHES[arch], **kwargs)

    return make
