"""Hand every attention of a diffusers Flux-type transformer to a handler, with layer, step and layout known."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from attn_dispatch import AttentionHandler, LayerKey, SdpaMode, StepContext, TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_STREAMS = (("double", "transformer_blocks"), ("single", "single_transformer_blocks"))


def layers(transformer: nn.Module) -> tuple[LayerKey, ...]:
    """Name the attention layers of a transformer in the order they run.

    Raises:
        ValueError: The model is no Flux-type transformer.
    """
    return tuple(_attentions(transformer))


def attention_shape(transformer: nn.Module) -> tuple[int, int]:
    """Return the number of heads and the head width of a transformer's attention.

    Raises:
        ValueError: The model is no Flux-type transformer, or its layers differ.
    """
    shapes = {(int(attention.heads), int(attention.head_dim)) for attention in _attentions(transformer).values()}
    if len(shapes) != 1:
        raise ValueError(f"attention layers of {type(transformer).__name__} differ in (heads, width): {sorted(shapes)}")
    return shapes.pop()


class DiffusersHost:
    """Inside this context every attention of the transformer reaches ``handler(call, native)``.

    A call carries its ``LayerKey`` (``transformer_blocks`` are ``"double"``, ``single_transformer_blocks`` are
    ``"single"``), the step read from the transformer's ``timestep``, and the token layout read from its inputs: text
    first, then the image grid, then grids of reference images (ids whose first coordinate differs from the first
    image token's). What cannot be read is left open rather than guessed: no step if the timesteps of a batch differ,
    no grid if the ids are no raster, no layer for an attention over other tokens (image prompts).

    Nothing is patched: module hooks catch attention inside the attention modules only and are gone on exit, also
    after an error. The host serves the thread that entered it, and can be entered again after exit. Hosts nest: the
    ``native`` of the inner one reaches the outer one. The timestep is read once per forward, ids once per tensor.

    Args:
        transformer: A ``FluxTransformer2DModel`` or another model with such blocks.
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
        self._attentions = _attentions(transformer)
        self._signature = inspect.signature(transformer.forward)
        self._cfg_scale = float(cfg_scale)
        self._cond_or_uncond = tuple(cond_or_uncond)
        self._latent_size = latent_size
        self._mode = SdpaMode(handler, self._describe)
        self._handles: list[RemovableHandle] = []
        self._thread: int | None = None
        self._entered = 0
        self._layer: LayerKey | None = None
        self._step: StepContext | None = None
        self._layout: TokenLayout | None = None
        self._read_ids: tuple[Tensor, tuple[TokenGrid, ...]] | None = None

    @property
    def declines(self) -> Mapping[str, int]:
        """How often attention calls went past the handler, by reason."""
        return self._mode.declines

    def __enter__(self) -> DiffusersHost:
        if self._thread is not None:
            raise ValueError("this host is entered already; make another one to nest")
        self._thread = threading.get_ident()
        transformer = self._transformer
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
        self._read_ids = None
        self._thread = None

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        self._leave_modes()
        self._forget_forward()
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        self._layout = self._read_layout(inputs)
        size = self._latent_size
        if size is None and self._layout is not None and self._layout.grids:
            size = (self._layout.grids[0].rows, self._layout.grids[0].columns)
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
        self._layer = self._step = self._layout = None

    def _describe(self, q: Tensor, k: Tensor) -> tuple[LayerKey | None, StepContext | None, TokenLayout | None]:
        layout = self._layout
        if layout is not None and (q.shape[2] != layout.length or k.shape[2] != layout.length):
            return None, self._step, None
        return self._layer, self._step, layout

    def _read_layout(self, inputs: Mapping[str, Any]) -> TokenLayout | None:
        image, text, ids = inputs.get("hidden_states"), inputs.get("encoder_hidden_states"), inputs.get("img_ids")
        if not isinstance(image, Tensor) or not isinstance(ids, Tensor) or image.ndim != 3:
            return None
        words = text.shape[1] if isinstance(text, Tensor) else 0
        tokens = image.shape[1]
        if self._read_ids is None or self._read_ids[0] is not ids:
            self._read_ids = (ids, _grids(ids))
        grids = self._read_ids[1]
        if sum(grid.tokens for grid in grids) != tokens:
            grids = ()
        if self._latent_size is not None:
            grids = (_latent_grid(self._latent_size, grids[0].tokens if grids else tokens), *grids[1:])
        placed = tuple(TokenGrid(words + grid.start, grid.rows, grid.columns) for grid in grids)
        spans = ((0, words),) if words else ()
        return TokenLayout(words + tokens, spans, placed[:1], placed[1:])


class _EnterHook:
    def __init__(self, host: DiffusersHost, layer: LayerKey) -> None:
        self._host = host
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._host._before_attention(self._layer)


def _attentions(transformer: nn.Module) -> dict[LayerKey, Any]:
    found: dict[LayerKey, Any] = {}
    for stream, name in _STREAMS:
        for index, block in enumerate(getattr(transformer, name, ())):
            attention = getattr(block, "attn", None)
            if not isinstance(attention, nn.Module):
                raise ValueError(f"{type(transformer).__name__}.{name}[{index}] has no attention module 'attn'")
            found[LayerKey(stream, index)] = attention
    if not found:
        raise ValueError(
            f"{type(transformer).__name__} has neither transformer_blocks nor single_transformer_blocks; "
            "give a Flux-type transformer, such as the transformer of a pipeline"
        )
    return found


def _one_sigma(timestep: object) -> float | None:
    if isinstance(timestep, Tensor):
        values = set(timestep.reshape(-1).tolist())
        return float(values.pop()) if len(values) == 1 else None
    return float(timestep) if isinstance(timestep, (int, float)) else None


def _grids(ids: Tensor) -> tuple[TokenGrid, ...]:
    """Read position ids ``[N, 3]`` (image, row, column) as grids from token 0 on; empty if one is no raster."""
    table = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64)
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] < 3:
        return ()
    _, counts = torch.unique_consecutive(table[:, 0], return_counts=True)
    grids: list[TokenGrid] = []
    start = 0
    for count in counts.tolist():
        part = table[start : start + count]
        rows, columns = (len(torch.unique(part[:, axis])) for axis in (1, 2))
        if rows * columns != count:
            return ()
        raster = part[:, 1:3].reshape(rows, columns, 2)
        if not bool((raster[:, :, 0] == raster[:, :1, 0]).all() & (raster[:, :, 1] == raster[:1, :, 1]).all()):
            return ()
        grids.append(TokenGrid(start, rows, columns))
        start += count
    return tuple(grids)


def _latent_grid(latent_size: tuple[int, int], tokens: int) -> TokenGrid:
    """Find the token grid of a latent whose tokens are square patches."""
    rows, columns = latent_size
    patch = math.isqrt(rows * columns // tokens) if tokens else 0
    if patch < 1 or rows % patch or columns % patch or rows * columns != tokens * patch * patch:
        raise ValueError(
            f"latent_size {latent_size} does not fit {tokens} image tokens; "
            "give rows and columns of the latent that is sampled, or leave it out"
        )
    return TokenGrid(0, rows // patch, columns // patch)
