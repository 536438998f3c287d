"""One attention call of the host in all its forms: described rightly, or declined, and always bit-equal natively."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, NativeAttention, StepContext, TokenLayout, join_mask
from attn_dispatch.adapters.comfyui_fake import overridable, plain_attention
from attn_dispatch.adapters.comfyui_override import FACTS, INSTALLED, OVERRIDE, ComfyOverride, ModelFacts
from attn_dispatch.testing import RecordingHandler
from attn_kernels import TokenGrid
from torch import Tensor
from torch.nn import functional

from .conftest import prepare_comfyui

B, H, NQ, NK, D = 2, 3, 8, 11, 16
Attention = Callable[..., Tensor]


@pytest.fixture(
    params=[
        "fake",
        *(
            pytest.param(name, marks=pytest.mark.comfyui)
            for name in ("attention_pytorch", "attention_basic", "attention_sub_quad", "attention_split")
        ),
    ]
)
def attention(request: pytest.FixtureRequest) -> Attention:
    if request.param == "fake":
        return overridable(plain_attention)
    prepare_comfyui()
    import comfy.ldm.modules.attention as module

    found: Attention = getattr(module, request.param)
    return found


class Own(RecordingHandler):
    """Answers from what the call says, and never natively."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        super().__call__(call, native)
        mask = join_mask(call.key_mask, call.attn_bias, call.q.dtype)
        return functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)


def options_for(handler: Any, facts: ModelFacts | None = None, **more: Any) -> dict[str, Any]:
    override = ComfyOverride(handler)
    found = {} if facts is None else {FACTS: {INSTALLED: facts}}
    return {OVERRIDE: override, INSTALLED: {INSTALLED: override}, **found, **more}


def make_qkv(queries: int = NQ, keys: int = NK) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, queries, D, generator=g) * 1.5
    return q, torch.randn(B, H, keys, D, generator=g) * 1.5, torch.randn(B, H, keys, D, generator=g)


def flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "2-D": torch.randn(NQ, NK, generator=g),
        "3-D": torch.randn(B, NQ, NK, generator=g),
        "3-D per key": torch.randn(B, 1, NK, generator=g),
        "4-D": torch.randn(B, H, NQ, NK, generator=g),
        "4-D per key": torch.randn(B, 1, 1, NK, generator=g),
    }


@pytest.mark.parametrize("output_heads", [False, True])
@pytest.mark.parametrize("input_heads", [False, True])
@pytest.mark.parametrize("positional", [False, True])
def test_both_layouts_in_and_out(attention: Attention, input_heads: bool, output_heads: bool, positional: bool) -> None:
    q, k, v = make_qkv()
    tensors = (q, k, v) if input_heads else (flat(q), flat(k), flat(v))
    layout = {"skip_reshape": input_heads, "skip_output_reshape": output_heads}
    args, named = ((*tensors, H, None), layout) if positional else (tensors, {"heads": H, "mask": None, **layout})
    expected = attention(*args, **named)
    recording, own = RecordingHandler(), Own()
    assert torch.equal(attention(*args, **named, transformer_options=options_for(recording)), expected)
    answer = attention(*args, **named, transformer_options=options_for(own))
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    for found, want in zip((recording.calls[0].q, own.calls[0].k, own.calls[0].v), (q, k, v), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("positional", [False, True])
def test_additive_masks_mean_what_the_host_means(attention: Attention, name: str, positional: bool) -> None:
    q, k, v = make_qkv()
    mask = masks()[name]
    args, named = ((q, k, v, H, mask), {}) if positional else ((q, k, v, H), {"mask": mask})
    expected = attention(*args, **named, skip_reshape=True)
    recording, own = RecordingHandler(), Own()
    routed = attention(*args, **named, skip_reshape=True, transformer_options=options_for(recording))
    assert torch.equal(routed, expected)
    answer = attention(*args, **named, skip_reshape=True, transformer_options=options_for(own))
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    assert own.calls[0].attn_bias is not None


def test_bool_masks_become_key_masks_where_they_are_per_key() -> None:
    q, k, v = make_qkv()
    g = torch.Generator().manual_seed(2)
    keep = torch.rand(B, 1, NK, generator=g) > 0.4
    keep[..., 0] = True
    attention = overridable(plain_attention)
    for mask in (keep, keep[:, None], keep[:1, 0], keep[:, :, None, :][:, 0].expand(B, NQ, NK)):
        own = Own()
        expected = attention(q, k, v, H, mask, skip_reshape=True)
        answer = attention(q, k, v, H, mask, skip_reshape=True, transformer_options=options_for(own))
        torch.testing.assert_close(answer, expected)
        assert own.calls[0].key_mask is not None
        assert own.calls[0].attn_bias is None
    own = Own()
    per_query = torch.rand(NQ, NK, generator=g) > 0.3
    attention(q, k, v, H, per_query, skip_reshape=True, transformer_options=options_for(own))
    assert own.calls[0].key_mask is None
    assert own.calls[0].attn_bias is not None


def test_an_additive_mask_of_zero_and_lowest_becomes_a_key_mask_where_the_network_says_so() -> None:
    q, k, v = make_qkv()
    keep = torch.arange(NK).expand(B, 1, NK) < torch.tensor([5, 9])[:, None, None]
    mask = (keep.float() - 1) * torch.finfo(torch.float32).max
    attention = overridable(plain_attention)
    expected = attention(q, k, v, H, mask, skip_reshape=True)
    for binary in (False, True):
        own = Own()
        options = options_for(own, ModelFacts(binary_mask=binary))
        answer = attention(q, k, v, H, mask, skip_reshape=True, transformer_options=options)
        torch.testing.assert_close(answer, expected)
        assert (own.calls[0].key_mask is not None) == binary
    assert own.calls[0].key_mask is not None
    assert torch.equal(own.calls[0].key_mask, keep[:, 0])


DECLINES: dict[str, tuple[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "grouped heads": (
        "grouped heads",
        lambda: ((make_qkv()[0], make_qkv()[1][:, :1], make_qkv()[2][:, :1], H), {"enable_gqa": True}),
    ),
    "precision": ("the host asks for full precision", lambda: ((*make_qkv(), H), {"low_precision_attention": False})),
    "2-D mask of a batch": (
        "the mask does not broadcast to the scores",
        lambda: ((*make_qkv(), H, torch.ones(B, NK, dtype=torch.bool)), {}),
    ),
    "integer mask": (
        "the mask has dtype torch.int64, neither bool nor float",
        lambda: ((*make_qkv(), H, torch.ones(NQ, NK, dtype=torch.int64)), {}),
    ),
    "5-D mask": ("the mask has 5 axes", lambda: ((*make_qkv(), H, torch.zeros(1, 1, 1, NQ, NK)), {})),
    "3-D tensors": ("q, k and v are not [B, H, N, D]", lambda: ((*(x[0] for x in make_qkv()), H), {})),
    "misfit": (
        "q, k and v do not fit each other",
        lambda: ((make_qkv()[0], make_qkv()[1], make_qkv()[2][:, :, 1:], H), {}),
    ),
    "no tensors": ("q, k and v are not tensors", lambda: (("q", "k", "v", H), {})),
    "too many": ("unknown arguments", lambda: ((*make_qkv(), H, None, None, True, False, "more"), {})),
}


@pytest.mark.parametrize("name", DECLINES)
def test_what_a_call_cannot_express_runs_as_if_nothing_were_there(name: str) -> None:
    reason, make = DECLINES[name]
    args, named = make()
    if "skip_reshape" not in named and len(args) < 7:
        named["skip_reshape"] = True
    seen: list[Any] = []

    def host(*given: Any, **keywords: Any) -> str:
        seen.append((given, keywords))
        return "host"

    handler = Own()
    options = options_for(handler)
    assert overridable(host)(*args, **named, transformer_options=options) == "host"
    assert handler.calls == []
    assert dict(options[OVERRIDE].declines) == {reason: 1}
    ((given, keywords),) = seen
    assert all(one is two for one, two in zip(given, args, strict=True))
    assert keywords == {**named, "transformer_options": options, "_inside_attn_wrapper": True}


@pytest.mark.parametrize("output_heads", [False, True])
def test_what_the_handler_answers_counts_though_it_asked_native(output_heads: bool) -> None:
    class Doubling(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            return 2 * native(call)

    q, k, v = make_qkv()
    named = {"skip_reshape": True, "skip_output_reshape": output_heads}
    attention = overridable(plain_attention)
    answer = attention(q, k, v, H, **named, transformer_options=options_for(Doubling()))
    assert torch.equal(answer, 2 * attention(q, k, v, H, **named))


def test_unknown_keywords_reach_native_also_when_the_call_was_changed() -> None:
    seen: list[dict[str, Any]] = []

    def host(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return plain_attention(*args, **kwargs)

    class Changing(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            assert call.scale == 0.2
            part = native(replace(call, q=call.q[:, :, :3], scale=0.4))
            want = functional.scaled_dot_product_attention(call.q[:, :, :3], call.k, call.v, scale=0.4)
            torch.testing.assert_close(part, want)
            return native(call)

    q, k, v = make_qkv()
    overridable(host)(
        q, k, v, H, skip_reshape=True, colour="red", scale=0.2, transformer_options=options_for(Changing())
    )
    assert [(one["colour"], one["scale"]) for one in seen] == [("red", 0.2)] * 2
    assert all(one["_inside_attn_wrapper"] for one in seen)


def test_facts_are_used_only_where_they_fit() -> None:
    step = StepContext(0.5, 3.0, (4, 4), (0,))
    layout = TokenLayout(NQ, ((0, 4),), (TokenGrid(4, 2, 2),))
    names = {"block_type": "double", "block_index": 2}

    def described(facts: ModelFacts, queries: int = NQ, keys: int = NQ, **more: Any) -> AttentionCall:
        handler = RecordingHandler()
        options = options_for(handler, facts, **{**names, **more})
        overridable(plain_attention)(*make_qkv(queries, keys), H, skip_reshape=True, transformer_options=options)
        return handler.calls[0]

    facts = ModelFacts(step, layout)
    call = described(facts)
    assert (call.layer, call.step, call.layout) == (LayerKey("double", 2), step, layout)
    assert described(facts, img_slice=[4, NQ]).layout is layout
    assert described(facts, img_slice=[3, NQ]).layout is None
    assert described(facts, img_slice=[4, NQ - 1]).layout is None
    longer = described(facts, NQ + 1, NQ + 1)
    assert (longer.layer, longer.layout) == (LayerKey("double", 2), None)
    crossed = described(facts, NQ, NK)
    assert (crossed.layer, crossed.layout, crossed.step) == (LayerKey("double_cross", 2), None, step)
    assert described(facts, NK, NQ).layout is None
    assert described(replace(facts, named=False)).layer is None
    assert described(facts, block_index=None).layer is None


def test_a_model_without_the_installation_is_not_touched() -> None:
    handler = Own()
    options = options_for(handler)
    del options[INSTALLED]
    q, k, v = make_qkv()
    attention = overridable(plain_attention)
    expected = attention(q, k, v, H, skip_reshape=True)
    assert torch.equal(attention(q, k, v, H, skip_reshape=True, transformer_options=options), expected)
    assert handler.calls == []
