import threading
from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, NativeAttention, SdpaMode, StepContext
from attn_dispatch.testing import RecordingHandler, TinyDiT
from torch import Tensor
from torch.nn import functional

sdpa = functional.scaled_dot_product_attention
B, H, NQ, NK, D, DV = 2, 3, 5, 9, 8, 6


def make_qkv(*, heads: int = H, kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(B, heads, NQ, D, generator=g)
    return q, 2 * torch.randn(B, kv_heads, NK, D, generator=g), torch.randn(B, kv_heads, NK, DV, generator=g)


def masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(B, 1, 1, NK, generator=g) > 0.4
    keep[..., 0] = True
    return {
        "key mask": keep,
        "key mask 2-D": keep[0, 0],
        "bool per query": (torch.rand(NQ, NK, generator=g) > 0.3) | (torch.arange(NK) == 0),
        "bias 2-D": torch.randn(NQ, NK, generator=g),
        "bias 4-D": torch.randn(B, H, NQ, NK, generator=g),
    }


class Handler:
    """Answers by a function and needs no runs."""

    def __init__(self, answer: Callable[[AttentionCall, NativeAttention], Tensor]) -> None:
        self.answer = answer

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        return self.answer(call, native)

    def begin_run(self) -> None:
        raise AssertionError("the mode must not begin runs")

    def end_run(self) -> None:
        raise AssertionError("the mode must not end runs")


def ones(call: AttentionCall, native: NativeAttention) -> Tensor:
    return torch.ones(*call.q.shape[:3], call.v.shape[3])


@pytest.mark.parametrize("style", ["positional", "keyword", "mixed"])
@pytest.mark.parametrize("inference", [False, True])
def test_calls_reach_the_handler_and_native_is_bit_equal(style: str, inference: bool) -> None:
    q, k, v = make_qkv()
    ask: dict[str, Callable[[], Tensor]] = {
        "positional": lambda: sdpa(q, k, v, None, 0.0, False),
        "keyword": lambda: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3),
        "mixed": lambda: sdpa(q, k, value=v, scale=None, enable_gqa=True),
    }
    handler = RecordingHandler()
    with torch.inference_mode(inference):
        expected = ask[style]()
        with SdpaMode(handler) as mode:
            assert torch.equal(ask[style](), expected)
        assert torch.equal(ask[style](), expected)
    (call,) = handler.calls
    assert call.q is q
    assert call.k is k
    assert call.v is v
    assert call.scale == (0.3 if style == "keyword" else None)
    assert (call.layer, call.step, call.layout, call.key_mask, call.attn_bias) == (None,) * 5
    assert not mode.declines


@pytest.mark.parametrize("name", masks())
def test_masks_are_understood(name: str) -> None:
    q, k, v = make_qkv()
    mask = masks()[name]
    expected = sdpa(q, k, v, attn_mask=mask)
    handler = RecordingHandler()
    with SdpaMode(handler):
        assert torch.equal(sdpa(q, k, v, mask), expected)
    (call,) = handler.calls
    assert (call.key_mask is not None) == name.startswith("key")
    assert (call.attn_bias is not None) != name.startswith("key")


@pytest.mark.parametrize("name", masks())
def test_native_answers_a_call_with_fewer_queries(name: str) -> None:
    q, k, v = make_qkv()
    mask = masks()[name]
    index = torch.tensor([3, 0])

    def sampled(call: AttentionCall, native: NativeAttention) -> Tensor:
        bias = call.attn_bias
        if bias is not None:
            bias = bias[:, :, index]
        part = native(AttentionCall(call.q[:, :, index], call.k, call.v, key_mask=call.key_mask, attn_bias=bias))
        torch.testing.assert_close(part, native(call)[:, :, index])
        return native(call)

    with SdpaMode(Handler(sampled)):
        assert torch.equal(sdpa(q, k, v, mask), sdpa(q, k, v, mask))


def test_native_honours_what_the_handler_changes() -> None:
    q, k, v = make_qkv()
    keep = torch.arange(NK).expand(B, NK) < 4
    with SdpaMode(Handler(lambda call, native: native(AttentionCall(call.q, call.k, call.v, 0.1, keep)))):
        out = sdpa(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k[:, :, :4], v[:, :, :4], scale=0.1))


def decline_cases() -> dict[str, tuple[str, Callable[[], Tensor]]]:
    q, k, v = make_qkv()
    grouped_q, grouped_k, grouped_v = make_qkv(heads=6, kv_heads=2)
    nested = [torch.nested.nested_tensor([x[0], x[0]], layout=torch.strided) for x in (q, k, v)]
    return {
        "3-D": ("q, k and v are not [B, H, N, D]", lambda: sdpa(q[0], k[0], v[0])),
        "batches": ("grouped or broadcast heads", lambda: sdpa(q, k[:1], v[:1])),
        "nested": ("nested tensors", lambda: sdpa(*nested)),
        "causal by keyword": ("causal attention", lambda: sdpa(query=q, key=k, value=v, is_causal=True, scale=0.2)),
        "dropout": ("dropout", lambda: sdpa(q, k, v, dropout_p=0.25)),
        "causal": ("causal attention", lambda: sdpa(q, k, v, is_causal=True)),
        "grouped": ("grouped or broadcast heads", lambda: sdpa(grouped_q, grouped_k, grouped_v, enable_gqa=True)),
    }


@pytest.mark.parametrize("name", decline_cases())
def test_what_a_call_cannot_express_runs_plainly_and_is_counted(name: str) -> None:
    reason, ask = decline_cases()[name]
    torch.manual_seed(7)
    expected = ask()
    with SdpaMode(Handler(ones)) as mode:
        torch.manual_seed(7)
        answer = ask()
    if expected.is_nested:
        answer, expected = answer.to_padded_tensor(0.0), expected.to_padded_tensor(0.0)
    assert torch.equal(answer, expected)
    assert dict(mode.declines) == {reason: 1}


def test_wrong_arguments_raise_what_torch_raises() -> None:
    q, k, v = make_qkv()
    with SdpaMode(Handler(ones)) as mode:
        with pytest.raises(TypeError):
            sdpa(q, k, v, colour="red")
        with pytest.raises(RuntimeError):
            sdpa(q, k, v, attn_mask=torch.ones(NQ, NK + 1, dtype=torch.bool))
    assert dict(mode.declines) == {"the mask does not broadcast to the scores": 1}


def test_arguments_of_a_newer_torch_are_left_to_torch() -> None:
    q, k, v = make_qkv()
    mode = SdpaMode(Handler(ones))
    with pytest.raises(TypeError, match="colour"):
        mode.__torch_function__(sdpa, (), (q, k, v), {"colour": "red"})
    assert dict(mode.declines) == {"unknown arguments": 1}


def test_a_handlers_own_attention_never_comes_back() -> None:
    q, k, v = make_qkv()
    depth: list[int] = []

    def student(call: AttentionCall, native: NativeAttention) -> Tensor:
        depth.append(len(depth))
        return sdpa(call.q, call.k[:, :, :3], call.v[:, :, :3]) + 0 * native(call)

    mode = SdpaMode(Handler(student))
    with mode, mode:
        sdpa(q, k, v)
    # Twice entered, the native of the upper one reaches the lower one; the student's own call reaches neither.
    assert len(depth) == 2


def test_nested_modes_chain_through_native_only() -> None:
    q, k, v = make_qkv()
    outer = RecordingHandler()

    def student(call: AttentionCall, native: NativeAttention) -> Tensor:
        return sdpa(call.q, call.k[:, :, :3], call.v[:, :, :3])

    with SdpaMode(outer), SdpaMode(Handler(student)):
        out = sdpa(q, k, v)
    assert outer.calls == []
    assert torch.equal(out, sdpa(q, k[:, :, :3], v[:, :, :3]))
    inner = RecordingHandler()
    with SdpaMode(outer), SdpaMode(inner):
        assert torch.equal(sdpa(q, k, v), sdpa(q, k, v))
    assert (len(inner.calls), len(outer.calls)) == (2, 2)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_an_error_in_a_handler_passes_and_leaves_nothing_behind(error: BaseException) -> None:
    q, k, v = make_qkv()

    def broken(call: AttentionCall, native: NativeAttention) -> Tensor:
        raise error

    with pytest.raises(type(error)), SdpaMode(Handler(broken)):
        sdpa(q, k, v)
    handler = RecordingHandler()
    with SdpaMode(handler):
        sdpa(q, k, v)
    assert len(handler.calls) == 1


def test_two_threads_with_two_handlers_do_not_mix() -> None:
    q, k, v = make_qkv()
    barrier = threading.Barrier(2)
    found: dict[float, set[float]] = {}

    def work(value: float) -> None:
        def answer(call: AttentionCall, native: NativeAttention) -> Tensor:
            barrier.wait(timeout=10)
            return torch.full((B, H, NQ, DV), value)

        with SdpaMode(Handler(answer)):
            found[value] = {entry for _ in range(20) for entry in sdpa(q, k, v).unique().tolist()}

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1.0: {1.0}, 2.0: {2.0}}


def test_another_thread_is_not_caught() -> None:
    q, k, v = make_qkv()
    out: list[Tensor] = []
    with SdpaMode(Handler(ones)):
        thread = threading.Thread(target=lambda: out.append(sdpa(q, k, v)))
        thread.start()
        thread.join()
    assert torch.equal(out[0], sdpa(q, k, v))


def test_describe_names_the_call() -> None:
    q, k, v = make_qkv()
    handler = RecordingHandler()
    with SdpaMode(handler, lambda q, k: (LayerKey("x", q.shape[2]), StepContext(0.5), None)):
        sdpa(q, k, v)
    assert handler.calls[0].layer == LayerKey("x", NQ)
    assert handler.calls[0].step == StepContext(0.5)


def test_gradients_flow_through_native() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in make_qkv())
    sdpa(q, k, v).square().sum().backward()
    assert q.grad is not None
    expected, q.grad = q.grad, None
    with SdpaMode(AttentionRouter()):
        sdpa(q, k, v).square().sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_whole_model_is_bit_equal(masked: bool) -> None:
    model = TinyDiT()
    inputs = model.example(4, 3, batch=2)
    if masked:
        inputs["mask"] = (torch.arange(17) > 2).expand(2, 1, 17, 17)
    with torch.inference_mode():
        expected = model(**inputs)
        router = AttentionRouter()
        with SdpaMode(router):
            assert torch.equal(model(**inputs), expected)
    assert router.report.counts() == {"native": 5}


def test_scale_mask_and_grouping_reach_native_together() -> None:
    q, k, v = make_qkv()
    mask = masks()["bias 4-D"]
    handler = RecordingHandler()
    expected = sdpa(query=q, key=k, value=v, attn_mask=mask, scale=0.2, enable_gqa=True)
    with SdpaMode(handler):
        assert torch.equal(sdpa(query=q, key=k, value=v, attn_mask=mask, scale=0.2, enable_gqa=True), expected)
    (call,) = handler.calls
    assert call.scale == 0.2
    assert call.attn_bias is not None
    assert torch.equal(call.attn_bias, mask)


def test_a_compiled_model_is_caught_and_right() -> None:
    model = TinyDiT()
    inputs = model.example(4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(**inputs)
        torch.testing.assert_close(compiled(**inputs), expected)
        handler = RecordingHandler()
        with SdpaMode(handler):
            torch.testing.assert_close(compiled(**inputs), expected)
    assert len(handler.calls) == 5
