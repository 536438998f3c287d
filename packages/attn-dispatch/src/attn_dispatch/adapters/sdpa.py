"""Catch ``torch.nn.functional.scaled_dot_product_attention`` of any torch code and hand it to a handler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attn_dispatch.call import AttentionCall, AttentionHandler, LayerKey, StepContext, TokenLayout
from attn_dispatch.masks import join_mask, mask_misfit, split_mask

Describe = Callable[[Tensor, Tensor], tuple[LayerKey | None, StepContext | None, TokenLayout | None]]
"""Says which layer, step and layout a call with these ``q`` and ``k`` ``[B, H, N, D]`` belongs to."""

_sdpa = functional.scaled_dot_product_attention

# True while a handler works: its own attention is then nobody's call. Per thread and task, as the modes themselves.
_in_handler: ContextVar[bool] = ContextVar("attn_dispatch_in_handler", default=False)


class _Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Arguments:
    return _Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class SdpaMode(TorchFunctionMode):
    """Inside this context every ``scaled_dot_product_attention`` call reaches ``handler(call, native)``.

    ``native`` is the caught call itself, bit-equal while the handler leaves the call's tensors as they are. What a
    handler computes never comes back to it or to another mode; only ``native`` does reach a mode entered earlier, so
    hosts nest. A call that ``AttentionCall`` cannot express runs as if there were no mode and is counted in
    ``declines``. The mode holds for the thread that entered it, also in inference mode. It calls neither
    ``begin_run`` nor ``end_run``: where a run begins and ends is known to the sampler alone.

    Args:
        handler: Who answers.
        describe: Names layer, step and layout of a call; without it they are ``None``.

    Attributes:
        declines: How often calls went past the handler, by reason.
    """

    def __init__(self, handler: AttentionHandler, describe: Describe | None = None) -> None:
        super().__init__()
        self.handler = handler
        self.describe = describe
        self.declines: Counter[str] = Counter()

    def __enter__(self) -> SdpaMode:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Hand attention to the handler and leave everything else alone."""
        # First and short: every torch function and tensor attribute in the context passes here.
        if func is not _sdpa:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if _in_handler.get():
            return func(*args, **kwargs)
        try:
            bound = _bind(*args, **kwargs)
        except TypeError:
            self.declines["unknown arguments"] += 1
            return func(*args, **kwargs)
        reason = _refusal(bound)
        if reason is not None:
            self.declines[reason] += 1
            return func(*args, **kwargs)
        return self._answer(bound)

    def _answer(self, bound: _Arguments) -> Tensor:
        key_mask, attn_bias = split_mask(bound.attn_mask, _score_shape(bound.q, bound.k))
        layer, step, layout = (None, None, None) if self.describe is None else self.describe(bound.q, bound.k)
        call = AttentionCall(
            bound.q,
            bound.k,
            bound.v,
            scale=bound.scale,
            key_mask=key_mask,
            attn_bias=attn_bias,
            layer=layer,
            step=step,
            layout=layout,
        )

        def native(asked: AttentionCall) -> Tensor:
            same_mask = asked.key_mask is key_mask and asked.attn_bias is attn_bias
            if same_mask and _score_shape(asked.q, asked.k) == _score_shape(bound.q, bound.k):
                mask = bound.attn_mask
            else:
                mask = join_mask(asked.key_mask, asked.attn_bias, asked.q.dtype)
            token = _in_handler.set(False)
            try:
                return _sdpa(asked.q, asked.k, asked.v, attn_mask=mask, scale=asked.scale, enable_gqa=bound.enable_gqa)
            finally:
                _in_handler.reset(token)

        token = _in_handler.set(True)
        try:
            return self.handler(call, native)
        finally:
            _in_handler.reset(token)


def _score_shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


def _refusal(bound: _Arguments) -> str | None:
    q, k, v, mask = bound.q, bound.k, bound.v, bound.attn_mask
    if q.is_nested or k.is_nested or v.is_nested:
        return "nested tensors"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return "q, k and v are not [B, H, N, D]"
    if bound.dropout_p > 0:
        return "dropout"
    if bound.is_causal:
        return "causal attention"
    if q.shape[:2] != k.shape[:2] or k.shape[:2] != v.shape[:2]:
        return "grouped or broadcast heads"
    if q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        return "q, k and v do not fit each other"
    return None if mask is None else mask_misfit(mask, _score_shape(q, k))
