from collections.abc import Callable

import pytest
import torch
from attn_dispatch.native import bindings
from attn_dispatch.native.bindings import Kernels, aligned_bias, quantise_heads
from attn_kernels import softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from torch import Tensor

BF16 = torch.bfloat16
# Binder, module, relative error of the output in bfloat16 (in float8 where it quantises).
BOUND: dict[str, tuple[Callable[[object], Kernels], str, float]] = {
    "sage": (bindings.bind_sage, "sageattention", 0.01),
    "sage3": (bindings.bind_sage3, "sageattn3", 0.02),
    "flash2": (bindings.bind_flash2, "flash_attn", 0.01),
    "flash3": (bindings.bind_flash3, "flash_attn_interface", 0.01),
    "flash3_fp8": (bindings.bind_flash3_fp8, "flash_attn_interface", 0.09),
    "flash4": (bindings.bind_flash4, "flash_attn.cute", 0.01),
    "flash4_fp8": (bindings.bind_flash4_fp8, "flash_attn.cute", 0.09),
    "xformers": (bindings.bind_xformers, "xformers.ops", 0.01),
    "comfy_kitchen": (bindings.bind_comfy_kitchen, "comfy_kitchen", 0.01),
    "sdpa_math": (bindings.bind_sdpa_math, "torch", 0.01),
    "sdpa_flash_cpu": (bindings.bind_sdpa_flash_cpu, "torch", 0.01),
}
GROUPED = ("sage", "flash2", "flash3", "flash3_fp8", "flash4", "flash4_fp8", "comfy_kitchen", "sdpa_math")


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return softmax_attention(q.float(), k.float(), v.float(), scale=scale, attn_bias=bias).out.to(q.dtype)


@pytest.fixture
def kernels(packages, request) -> Kernels:
    bind, module, _ = BOUND[request.param]
    return bind(packages.modules[module])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kernels", BOUND, indirect=True)
def test_every_package_attends_as_softmax_does(kernels: Kernels, scale: float | None, request) -> None:
    limit = BOUND[request.node.callspec.params["kernels"]][2]
    q, k, v = make_qkv(2, 4, 61, 32, kv_tokens=77, dtype=BF16)
    output = kernels.dense(q, k, v, None, 0.0, scale)
    assert output.dtype is BF16
    assert_close("output", output, oracle(q, k, v, scale), limit)


@pytest.mark.parametrize("kernels", BOUND, indirect=True)
def test_no_package_changes_its_inputs(kernels: Kernels) -> None:
    inputs = make_qkv(2, 4, 61, 32, dtype=BF16)
    before = [x.clone() for x in inputs]
    kernels.dense(*inputs, None, 0.0, None)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize("kernels", GROUPED, indirect=True)
def test_grouped_heads_go_to_their_group(kernels: Kernels, request) -> None:
    limit = BOUND[request.node.callspec.params["kernels"]][2]
    q, k, v = make_qkv(2, 6, 33, 16, dtype=BF16)
    assert_close("output", kernels.dense(q, k[:, :2], v[:, :2], None, 0.0, None), oracle(q, k[:, :2], v[:, :2]), limit)


@pytest.mark.parametrize("kernels", BOUND, indirect=True)
def test_any_strides_are_taken(kernels: Kernels, request) -> None:
    limit = BOUND[request.node.callspec.params["kernels"]][2]
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in make_qkv(2, 4, 61, 32, dtype=BF16))
    assert q.stride(-1) != 1
    assert_close("output", kernels.dense(q, k, v, None, 0.0, None), oracle(q, k, v), limit)


MASKS = {
    "bool": lambda g: torch.rand(2, 4, 13, 19, generator=g) > 0.5,
    "bool for all heads": lambda g: torch.rand(2, 1, 13, 19, generator=g) > 0.5,
    "bool of keys": lambda g: torch.rand(2, 1, 1, 19, generator=g) > 0.5,
    "bool 2-D": lambda g: torch.rand(13, 19, generator=g) > 0.5,
    "float": lambda g: torch.randn(2, 4, 13, 19, generator=g, dtype=BF16),
    "float 3-D": lambda g: torch.randn(4, 13, 19, generator=g, dtype=BF16),
}


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("kernels", ["xformers", "comfy_kitchen", "sdpa_math", "sdpa_flash_cpu"], indirect=True)
def test_masks_of_every_form_are_understood(kernels: Kernels, mask_name: str) -> None:
    assert kernels.masks
    mask = MASKS[mask_name](torch.Generator().manual_seed(1))
    if mask.dtype is torch.bool:
        mask[..., 0] = True
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else mask.float()
    q, k, v = make_qkv(2, 4, 13, 32, kv_tokens=19, dtype=BF16)
    assert_close("output", kernels.dense(q, k, v, mask, 0.0, None), oracle(q, k, v, bias=bias), 0.01)


def test_an_aligned_bias_costs_no_more_than_the_mask() -> None:
    q, k, _ = make_qkv(2, 4, 13, 32, kv_tokens=19)
    bias = aligned_bias(torch.ones(1, 1, 1, 19, dtype=torch.bool), q, k)
    assert bias.shape == (2, 4, 13, 19)
    assert bias.untyped_storage().nbytes() == 13 * 24 * 4
    assert bias.stride()[:3] == (0, 0, 24)


@pytest.mark.parametrize("kernels", ["sage", "flash2", "flash3", "flash3_fp8", "flash4", "xformers"], indirect=True)
def test_packed_sequences_stay_apart(kernels: Kernels, request) -> None:
    limit = BOUND[request.node.callspec.params["kernels"]][2]
    lengths_q, lengths_kv = [5, 0, 17, 3], [9, 2, 31, 0]
    q, k, v = (x[0].transpose(0, 1) for x in make_qkv(1, 4, 25, 32, kv_tokens=42, dtype=BF16))
    cu_q, cu_kv = (torch.tensor([0, *one]).cumsum(0).int() for one in (lengths_q, lengths_kv))
    assert kernels.varlen is not None
    output = kernels.varlen(q, k, v, cu_q, cu_kv, 17, 31, 0.2)
    parts = zip(q.split(lengths_q), k.split(lengths_kv), v.split(lengths_kv), strict=True)
    expected = [
        oracle(*(x.transpose(0, 1)[None] for x in (a, b, c)), 0.2)[0].transpose(0, 1) if len(b) else torch.zeros_like(a)
        for a, b, c in parts
    ]
    assert_close("output", output, torch.cat(expected), limit)


def test_float8_keeps_each_head_in_its_own_range() -> None:
    x = torch.randn(2, 7, 6, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] *= 1e4
    x[:, :, 4] = 0
    quantised, descale = quantise_heads(x, 3, (1,))
    assert quantised.dtype is torch.float8_e4m3fn
    assert descale.shape == (2, 3)
    back = quantised.float() * descale.repeat_interleave(2, 1)[:, None, :, None]
    # Heads 0 and 1 share a scale, so head 1 may lose all; 2, 3 and 5 must not notice. 3 bits of mantissa: 1/16.
    for head in (0, 2, 3, 5):
        assert_close(f"head {head}", back[:, :, head], x[:, :, head], 0.04)
    assert quantised.float().abs().max() == 448
    assert torch.equal(back[:, :, 4], torch.zeros(2, 7, 16))


def test_a_flash_attention_3_without_scales_has_no_float8(packages) -> None:
    module = packages.modules["flash_attn_interface"]
    module.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: None
    with pytest.raises(AttributeError, match="no FP8"):
        bindings.bind_flash3_fp8(module)


def test_older_packages_that_answer_with_their_normaliser_are_understood(packages) -> None:
    module = packages.modules["flash_attn_interface"]
    inner = module.flash_attn_func
    module.flash_attn_func = lambda *args, **kwargs: (inner(*args, **kwargs), None)
    q, k, v = make_qkv(1, 2, 9, 16, dtype=BF16)
    assert_close("output", bindings.bind_flash3(module).dense(q, k, v, None, 0.0, None), oracle(q, k, v), 0.01)


def test_the_first_generation_of_sage_is_called_so(packages) -> None:
    module = packages.modules["sageattention"]
    assert bindings.bind_sage(module).label is None
    del module.sageattn_qk_int8_pv_fp16_cuda
    assert bindings.bind_sage(module).label == "SageAttention 1 (INT8)"


def test_a_sage_that_would_swallow_a_mask_is_not_given_one(packages) -> None:
    module = packages.modules["sageattention"]
    assert not bindings.bind_sage(module).masks
    inner = module.sageattn

    def with_mask(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, attn_mask=None, **kwargs):
        return inner(q, k, v, tensor_layout, is_causal, sm_scale) * 0 + attn_mask.sum()

    module.sageattn = with_mask
    kernels = bindings.bind_sage(module)
    assert kernels.masks
    q, k, v = make_qkv(1, 2, 9, 16, dtype=BF16)
    assert torch.all(kernels.dense(q, k, v, torch.ones(9, 9), 0.0, None) == 81)


def test_an_answer_that_is_no_tensor_is_an_error(packages) -> None:
    module = packages.modules["flash_attn"]
    module.flash_attn_func = lambda *args, **kwargs: None
    with pytest.raises(TypeError, match="NoneType, not a tensor"):
        bindings.bind_flash2(module).dense(*make_qkv(1, 2, 9, 16, dtype=BF16), None, 0.0, None)


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient"])
def test_the_operators_of_torch_for_gpus_exist_and_refuse_the_cpu(name: str) -> None:
    bind = {
        "sdpa_flash": bindings.bind_sdpa_flash,
        "sdpa_cudnn": bindings.bind_sdpa_cudnn,
        "sdpa_efficient": bindings.bind_sdpa_efficient,
    }[name]
    with pytest.raises(NotImplementedError, match="CPU"):
        bind(torch).dense(*make_qkv(1, 2, 9, 16, dtype=BF16), None, 0.0, None)
