"""Prompts that a host evaluates in one batch, handed to a handler one by one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_dispatch.adapters.comfyui_arguments import same_scores
from attn_dispatch.call import AttentionCall, AttentionHandler, NativeAttention


class SplitConditions:
    """An ``AttentionHandler`` that splits a call by ``step.cond_or_uncond`` and hands on each part as its own call.

    Whether a host evaluates the prompts together depends on its free memory; behind this handler both ways look the
    same: every call has one condition. Native attention of the parts is computed once for the whole batch, so if every
    part is answered with it the answer is the host's own. Calls of one condition, or of unknown ones, pass as they are.

    Args:
        handler: Answers the parts.
    """

    def __init__(self, handler: AttentionHandler) -> None:
        self.handler = handler

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``call`` with ``[B, H, Nq, Dv]``."""
        kinds = () if call.step is None else call.step.cond_or_uncond
        batch = call.q.shape[0]
        if len(kinds) < 2 or batch % len(kinds):
            return self.handler(call, native)
        whole: Tensor | None = None
        exact: list[Tensor] = []
        outputs: list[Tensor] = []
        rows = batch // len(kinds)
        for index in range(len(kinds)):
            part = slice(index * rows, (index + 1) * rows)
            piece = _part(call, part, kinds[index])

            def answer(asked: AttentionCall, piece: AttentionCall = piece, part: slice = part) -> Tensor:
                nonlocal whole
                if asked is not piece and not same_scores(asked, piece):
                    return native(asked)
                if whole is None:
                    whole = native(call)
                exact.append(whole[part])
                return exact[-1]

            outputs.append(self.handler(piece, answer))
        if whole is not None and all(any(output is one for one in exact) for output in outputs):
            return whole
        return torch.cat(outputs)

    def begin_run(self) -> None:
        """Pass on."""
        self.handler.begin_run()

    def end_run(self) -> None:
        """Pass on."""
        self.handler.end_run()

    def end_step(self) -> bool:
        """Pass on that a model call is over; True = make the call again."""
        end_step = getattr(self.handler, "end_step", None)
        return end_step is not None and bool(end_step())


def _part(call: AttentionCall, rows: slice, kind: int) -> AttentionCall:
    bias = call.attn_bias
    if bias is not None and bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias[rows]
    return replace(
        call,
        q=call.q[rows],
        k=call.k[rows],
        v=call.v[rows],
        key_mask=None if call.key_mask is None else call.key_mask[rows],
        attn_bias=bias,
        step=None if call.step is None else replace(call.step, cond_or_uncond=(kind,)),
    )
