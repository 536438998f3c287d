from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, NativeAttention, StepContext
from attn_dispatch.adapters.conditions import SplitConditions
from attn_dispatch.testing import RecordingHandler
from torch import Tensor
from torch.nn import functional

from .conftest import FakeHost, layers


def make_call(*kinds: int, batch: int = 4) -> AttentionCall:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, 7, 8, generator=g) for _ in range(3))
    keep = torch.rand(batch, 7, generator=g) > 0.3
    bias = torch.randn(batch, 1, 7, 7, generator=g)
    return AttentionCall(q, k, v, key_mask=keep, attn_bias=bias, step=StepContext(0.5, cond_or_uncond=kinds))


class Native:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: AttentionCall) -> Tensor:
        self.calls += 1
        assert call.key_mask is not None
        assert call.attn_bias is not None
        mask = call.attn_bias.masked_fill(~call.key_mask[:, None, None], -torch.inf)
        return functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask)


def test_every_part_is_a_call_of_one_condition() -> None:
    call, native, handler = make_call(1, 0), Native(), RecordingHandler()
    whole = SplitConditions(handler)(call, native)
    assert torch.equal(whole, Native()(call))
    assert native.calls == 1
    assert [part.step.cond_or_uncond for part in handler.calls if part.step] == [(1,), (0,)]
    for part, rows in zip(handler.calls, (slice(0, 2), slice(2, 4)), strict=True):
        assert torch.equal(part.q, call.q[rows])
        torch.testing.assert_close(Native()(part), whole[rows])


@pytest.mark.parametrize("kinds", [(), (0,), (1, 0, 0)])
def test_what_cannot_be_split_passes(kinds: tuple[int, ...]) -> None:
    call, handler = make_call(*kinds), RecordingHandler()
    SplitConditions(handler)(call, Native())
    assert handler.calls == [call]


def test_one_part_may_be_approximated_and_the_other_not() -> None:
    class Half(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            assert call.step is not None
            if call.step.cond_or_uncond == (0,):
                return native(replace(call, k=2 * call.k))
            return super().__call__(call, native)

    call = make_call(1, 0)
    out = SplitConditions(Half())(call, Native())
    assert torch.equal(out[:2], Native()(call)[:2])
    torch.testing.assert_close(out[2:], Native()(replace(call, k=2 * call.k))[2:])


def test_together_and_separate_look_the_same_in_a_host() -> None:
    host = FakeHost()
    found = []
    for together in (True, False):
        handler = RecordingHandler()
        host.sample(host.install(host.model(), SplitConditions(handler)), cfg=2.0, together=together)
        found.append(sorted(((str(call.layer), call.step) for call in handler.calls), key=str))
        assert (handler.begun, handler.ended, len(handler.calls)) == (1, 1, 6 * len(layers()))
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert {step for _, step in found[0]} == {step for _, step in found[1]}
