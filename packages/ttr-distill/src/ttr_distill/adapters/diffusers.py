"""Hand every attention of a diffusers Flux-type transformer to a handler, with layer, step and layout known."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, cast

import torch
from attn_dispatch import AttentionHandler, LayerKey, SdpaMode, StepContext, TokenLayout
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ttr_distill.adapters.diffusers_layout import LayoutReader

_STREAMS = (("double", "transformer_blocks"), ("single", "single_transformer_blocks"))
"""Lists of blocks whose layers have names of their own; those of any other list are named after it."""

_ATTENTIONS = ("attn", "attn1", "self_attn", "attention")
"""What a block calls its self-attention."""


def layers(transformer: nn.Module) -> tuple[LayerKey, ...]:
    """Name the attention layers of a transformer in the order of its blocks.

    Raises:
        ValueError: The model has no lists of blocks with attention.
    """
    return tuple(_attentions(transformer))


def attention_shape(transformer: nn.Module) -> tuple[int, int]:
    """Return the number of heads and the head width of a transformer's attention.

    Raises:
        ValueError: The model has no lists of blocks with attention, or its layers differ.
    """
    shapes = {(int(attention.heads), _width(attention)) for attention in _attentions(transformer).values()}
    if len(shapes) != 1:
        raise ValueError(f"attention layers of {type(transformer).__name__} differ in (heads, width): {sorted(shapes)}")
    return shapes.pop()


def _width(attention: Any) -> int:
    width = getattr(attention, "head_dim", None)
    return int(width if width is not None else attention.inner_dim // attention.heads)


class DiffusersHost:
    """Inside this context every attention of the transformer reaches ``handler(call, native)``.

    A call carries its ``LayerKey`` (``transformer_blocks`` are ``"double"``, ``single_transformer_blocks`` are
    ``"single"``, other lists of blocks keep their name), the step read from the transformer's ``timestep``, and the
    token layout read from its inputs: text first, then the image grid, then grids of reference images (ids whose first
    coordinate differs from the first image token's); for models that take a latent image, the grid of its patches.
    What cannot be read is left open rather than guessed: no step if the timesteps of a batch differ, no grid if the
    ids are no raster, no layer for an attention over other tokens (image prompts, the text of a cross-attention).

    Nothing is patched: module hooks catch attention inside the attention modules only and are gone on exit, also
    after an error. The host serves the thread that entered it, and can be entered again after exit. Hosts nest: the
    ``native`` of the inner one reaches the outer one. The timestep is read once per forward, ids once per tensor.
    Hooks that move weights (accelerate's CPU offload) go on working. A compiled model, whole or block by block, runs
    uncompiled inside, because what was compiled before has no place for the hooks; its compiled code is kept.

    Args:
        transformer: A ``FluxTransformer2DModel``, ``Flux2Transformer2DModel`` or any other model with lists of blocks
            whose attention goes through ``scaled_dot_product_attention``.
        handler: Who answers; its ``begin_run`` and ``end_run`` are called by whoever samples, not here.
        cfg_scale: Classifier-free guidance scale for the step context.
        cond_or_uncond: For each part of the batch 0 = conditional, 1 = unconditional.
        latent_size: Rows and columns of the latent in latent pixels, a whole multiple of the token grid; without it
            the grid is read from ``img_ids`` and the step context carries the token grid's size.

    Raises:
        ValueError: The model has no such blocks, or ``latent_size`` is not positive.
    """

    def __init__(
        self,
        transformer: nn.Module,
        handler: AttentionHandler,
        *,
        cfg_scale: float = 1.0,
        cond_or_uncond: tuple[int, ...] = (),
        latent_size: tuple[int, int] | None = None,
    ) -> None:
        if latent_size is not None and min(latent_size) < 1:
            raise ValueError(f"latent_size must be positive (rows, columns), got {latent_size}")
        self._transformer = transformer
        original = _original(transformer)
        self._attentions = _attentions(original)
        self._signature = inspect.signature(original.forward)
        patch = getattr(getattr(original, "config", None), "patch_size", None)
        self._reader = LayoutReader(type(original).__name__, patch if isinstance(patch, int) else None, latent_size)
        self._eager: AbstractContextManager[object] = nullcontext()
        self._cfg_scale = float(cfg_scale)
        self._cond_or_uncond = tuple(cond_or_uncond)
        self._latent_size = latent_size
        self._mode = SdpaMode(handler, self._describe)
        self._handles: list[RemovableHandle] = []
        self._thread: int | None = None
        self._entered = 0
        self._layer: LayerKey | None = None
        self._step: StepContext | None = None
        self._layouts: tuple[TokenLayout, ...] = ()

    @property
    def declines(self) -> Mapping[str, int]:
        """How often attention calls went past the handler, by reason."""
        return self._mode.declines

    def __enter__(self) -> DiffusersHost:
        if self._thread is not None:
            raise ValueError("this host is entered already; make another one to nest")
        self._thread = threading.get_ident()
        transformer = self._transformer
        if _is_compiled(transformer):
            self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._handles.append(transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(transformer.register_forward_hook(self._after_forward, prepend=True, always_call=True))
        for layer, attention in self._attentions.items():
            self._handles.append(attention.register_forward_pre_hook(_EnterHook(self, layer)))
            # Prepended: of nested hosts the inner one leaves first, and hooks of others run outside the mode.
            leave = attention.register_forward_hook(self._after_attention, prepend=True, always_call=True)
            self._handles.append(leave)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leave_modes()
        self._forget_forward()
        self._reader.forget()
        self._eager.__exit__(None, None, None)
        self._eager = nullcontext()
        self._thread = None

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        self._leave_modes()
        self._forget_forward()
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        self._layouts = self._reader.layouts(inputs)
        size = self._latent_size
        if size is None and self._layouts and self._layouts[0].grids:
            size = (self._layouts[0].grids[0].rows, self._layouts[0].grids[0].columns)
        sigma = _one_sigma(inputs.get("timestep"))
        if sigma is not None:
            self._step = StepContext(sigma, self._cfg_scale, size or (0, 0), self._cond_or_uncond)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if threading.get_ident() == self._thread:
            self._forget_forward()

    def _before_attention(self, layer: LayerKey) -> None:
        if threading.get_ident() == self._thread:
            self._layer = layer
            self._mode.__enter__()
            self._entered += 1

    def _after_attention(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        # Called after an error before our own pre-hook as well; then there is nothing to leave.
        if threading.get_ident() == self._thread and self._entered:
            self._layer = None
            self._entered -= 1
            self._mode.__exit__(None, None, None)

    def _leave_modes(self) -> None:
        # torch skips hooks when a forward ends by an interrupt (a BaseException): the mode is then still entered.
        while self._entered:
            self._entered -= 1
            self._mode.__exit__(None, None, None)

    def _forget_forward(self) -> None:
        self._layer = self._step = None
        self._layouts = ()

    def _describe(self, q: Tensor, k: Tensor) -> tuple[LayerKey | None, StepContext | None, TokenLayout | None]:
        if not self._layouts:
            return self._layer, self._step, None
        for layout in self._layouts:
            if q.shape[2] == k.shape[2] == layout.length:
                return self._layer, self._step, layout
        return None, self._step, None


class _EnterHook:
    def __init__(self, host: DiffusersHost, layer: LayerKey) -> None:
        self._host = host
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._host._before_attention(self._layer)


def _original(transformer: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` wrapped, or the model itself."""
    return cast("nn.Module", getattr(transformer, "_orig_mod", transformer))


def _is_compiled(transformer: nn.Module) -> bool:
    wrapped = _original(transformer) is not transformer
    return wrapped or any(getattr(part, "_compiled_call_impl", None) is not None for part in transformer.modules())


def _attentions(transformer: nn.Module) -> dict[LayerKey, Any]:
    found: dict[LayerKey, Any] = {}
    for stream, blocks in _lists_of_blocks(_original(transformer)):
        for index, block in enumerate(blocks):
            candidates = (getattr(block, name, None) for name in _ATTENTIONS)
            attention = next((candidate for candidate in candidates if isinstance(candidate, nn.Module)), None)
            if attention is not None and hasattr(attention, "heads"):
                found[LayerKey(stream, index)] = attention
    if not found:
        raise ValueError(
            f"{type(transformer).__name__} has no list of blocks with attention modules; "
            "give a diffusion transformer, such as the transformer of a pipeline"
        )
    return found


def _lists_of_blocks(transformer: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    own = {name: stream for stream, name in _STREAMS}
    lists = {name: part for name, part in transformer.named_children() if isinstance(part, nn.ModuleList)}
    for name in sorted(lists, key=lambda name: list(own).index(name) if name in own else len(own)):
        yield own.get(name, name), lists[name]


def _one_sigma(timestep: object) -> float | None:
    if isinstance(timestep, Tensor):
        values = set(timestep.reshape(-1).tolist())
        return float(values.pop()) if len(values) == 1 else None
    return float(timestep) if isinstance(timestep, (int, float)) else None
