"""The object that ComfyUI calls instead of its attention, and that calls a handler."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_dispatch.adapters.comfyui_arguments import (
    Attention,
    HostArguments,
    bind,
    from_heads,
    make_again,
    refusal,
    same_scores,
    score_mask,
    to_heads,
)
from attn_dispatch.call import AttentionCall, AttentionHandler, LayerKey, StepContext, TokenLayout
from attn_dispatch.masks import split_mask

OVERRIDE = "optimized_attention_override"
"""Key in ``transformer_options`` where ComfyUI looks for an override."""

INSTALLED = "attn_dispatch"
"""Key in ``transformer_options`` of what is installed on this model: ``{key: ComfyOverride}``."""

FACTS = "attn_dispatch_facts"
"""Key in ``transformer_options`` of what is known of the current model call: ``{key: ModelFacts}``."""

# Overrides whose native attention is being computed in this thread or task; None while a handler works.
_busy: ContextVar[tuple[object, ...] | None] = ContextVar("attn_dispatch_comfyui_busy", default=())


@dataclass(frozen=True)
class ModelFacts:
    """What one call of the network tells about all its attention calls.

    Attributes:
        step: The diffusion step; ``None`` if the host does not tell one noise level.
        layout: Layout of the joint self-attention; ``None`` if unknown.
        named: Whether a block's name belongs to one self-attention only.
        binary_mask: Whether additive masks hold only zero and the lowest number.
    """

    step: StepContext | None = None
    layout: TokenLayout | None = None
    named: bool = True
    binary_mask: bool = False


class ComfyOverride:
    """ComfyUI's ``optimized_attention_override`` that hands every attention call to ``handler(call, native)``.

    ``native`` is the host's own call, arguments and all, through the override that was there before; while the
    handler passes the call on as it is, the result is the very tensor that the host would have had. What a handler
    computes itself never comes back to a handler. Calls that an ``AttentionCall`` cannot express, and calls of a model
    on which this override is not installed, run as if it were not there; the first kind is counted in ``declines``.

    One object serves all clones of a model: ``copy.deepcopy`` returns it. It keeps nothing of a model call: step and
    layout travel in ``transformer_options``, so two models, or two threads, do not mix.

    Self-attention of a block is the layer ``block_type:block_index``, e.g. ``double:3``; its attention to other keys
    is ``double_cross:3``. Where neither the host nor ``comfyui_blocks`` names a block, ``layer`` is ``None``.

    Args:
        handler: Answers the calls; ``begin_run`` and ``end_run`` come from the wrappers that ``install`` adds.
        key: Name of the installation.
        previous: The override that was there before; ``None`` = none.
    """

    def __init__(self, handler: AttentionHandler, *, key: str = INSTALLED, previous: Attention | None = None) -> None:
        self.handler = handler
        self.key = key
        self.previous = previous
        self.declines: Counter[str] = Counter()
        self._layers: dict[tuple[str, int, bool], LayerKey] = {}
        self._outside: Callable[..., Any] | None = None
        self.prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> ComfyOverride:
        return self

    def prepare(self) -> None:
        """Keep ``torch.compile`` out of the handlers, once it has been imported; importing it takes seconds."""
        if self._outside is None and "torch._dynamo" in sys.modules:
            self._outside = torch.compiler.disable(self._answer)  # type: ignore[no-untyped-call]

    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> Any:
        """Answer one attention call of the host.

        Args:
            func: The host's attention function, unwrapped.
            args: Its positional arguments.
            kwargs: Its keyword arguments, ``transformer_options`` among them.

        Returns:
            What ``func`` would return: ``[B, Nq, H * Dv]``, or ``[B, H, Nq, Dv]`` with ``skip_output_reshape``.
        """
        return self.answer(self.previous, func, args, kwargs)

    def answer(self, previous: Attention | None, func: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call with another override before this one; arguments as in ``__call__``."""
        if self._outside is not None and torch.compiler.is_compiling():
            return self._outside(previous, func, args, kwargs)
        return self._answer(previous, func, args, kwargs)

    def _answer(
        self, previous: Attention | None, func: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        busy = _busy.get()
        options = kwargs.get("transformer_options")
        if busy is None or self in busy or options is None or not self._is_installed(options):
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)
        try:
            bound = bind(*args, **kwargs)
        except TypeError:
            reason: str | None = "unknown arguments"
        else:
            reason = refusal(bound)
            if reason is None:
                call = self._describe(bound, options)
                if isinstance(call, AttentionCall):
                    return self._handle(call, bound, busy, previous, func, args, kwargs)
                reason = call
        self.declines[str(reason)] += 1
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    def _is_installed(self, options: Mapping[str, Any]) -> bool:
        installed = options.get(INSTALLED)
        return installed is not None and installed.get(self.key) is self

    def _handle(
        self,
        call: AttentionCall,
        bound: HostArguments,
        busy: tuple[object, ...],
        previous: Attention | None,
        func: Attention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        answered: Tensor | None = None
        raw: Any = None

        def native(asked: AttentionCall) -> Tensor:
            nonlocal answered, raw
            token = _busy.set((*busy, self))
            try:
                if asked is not call and not same_scores(asked, call):

                    def exact(*more: Any, **named: Any) -> Any:
                        return func(*more, **named) if previous is None else previous(func, *more, **named)

                    return make_again(exact, bound, call, asked)
                raw = func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)
            finally:
                _busy.reset(token)
            answered = raw if bound.skip_output_reshape else to_heads(raw, bound.heads)
            return answered

        token = _busy.set(None)
        try:
            output = self.handler(call, native)
        finally:
            _busy.reset(token)
        if output is answered:
            # The host's own tensor, so that not even its strides differ.
            return raw
        return output if bound.skip_output_reshape else from_heads(output)

    def _describe(self, bound: HostArguments, options: dict[str, Any]) -> AttentionCall | str:
        """Make the call, or say why not."""
        facts = options.get(FACTS)
        known: ModelFacts | None = None if facts is None else facts.get(self.key)
        q, k, v = bound.q, bound.k, bound.v
        if not bound.skip_reshape:
            q, k, v = to_heads(q, bound.heads), to_heads(k, bound.heads), to_heads(v, bound.heads)
        queries, keys = q.shape[2], k.shape[2]
        key_mask: Tensor | None = None
        attn_bias: Tensor | None = None
        if bound.mask is not None:
            shape = (q.shape[0], q.shape[1], queries, keys)
            mask, reason = score_mask(bound.mask, shape)
            if reason is not None:
                return reason
            if known is not None and known.binary_mask and mask.is_floating_point() and _is_per_key(mask):
                mask = mask == 0
            key_mask, attn_bias = split_mask(mask, shape)
        step: StepContext | None = None
        layout: TokenLayout | None = None
        named = True
        if known is not None:
            step, named = known.step, known.named
            layout = known.layout
            if layout is not None and not (layout.length == keys == queries and _agrees(layout, options)):
                layout = None
        return AttentionCall(
            q,
            k,
            v,
            bound.rest.get("scale"),
            key_mask,
            attn_bias,
            None,
            self._layer(options, queries != keys) if named else None,
            step,
            layout,
        )

    def _layer(self, options: Mapping[str, Any], crossed: bool) -> LayerKey | None:
        stream, index = options.get("block_type"), options.get("block_index")
        if stream is None or index is None:
            return None
        layer = self._layers.get((stream, index, crossed))
        if layer is None:
            layer = LayerKey(f"{stream}_cross" if crossed else str(stream), int(index))
            self._layers[stream, index, crossed] = layer
        return layer


class Seat:
    """An override put above one that was installed later, for one model call.

    Args:
        override: Who answers.
        previous: What it finds in the slot.
    """

    def __init__(self, override: ComfyOverride, previous: Attention | None) -> None:
        self.override = override
        self.previous = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        return self

    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> Any:
        """Answer one attention call of the host; as ``ComfyOverride``."""
        return self.override.answer(self.previous, func, args, kwargs)


def reaches(slot: Any, override: ComfyOverride) -> bool:
    """Whether a call that enters at ``slot`` is known to come to ``override``."""
    while isinstance(slot, ComfyOverride | Seat):
        if slot is override or (isinstance(slot, Seat) and slot.override is override):
            return True
        slot = slot.previous
    return False


def _is_per_key(mask: Tensor) -> bool:
    return mask.shape[-2] == 1 and (mask.ndim < 4 or mask.shape[1] == 1)


def _agrees(layout: TokenLayout, options: Mapping[str, Any]) -> bool:
    """Whether the range of image tokens that the host announces, if it does, begins behind the text."""
    image = options.get("img_slice")
    if image is None:
        return True
    text = layout.text[0] if layout.text else (0, 0)
    return text[0] == 0 and text[1] == image[0] and bool(image[1] == layout.length)
