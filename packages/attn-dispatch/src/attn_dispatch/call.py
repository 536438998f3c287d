"""The seam: what one attention call is, and who may answer it. No logic lives here.

A host (ComfyUI, diffusers, a test) turns each attention into an ``AttentionCall`` and hands it, with its own exact
attention ``native``, to one ``AttentionHandler``. Routing, distilling and measuring are three handlers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from attn_kernels import TokenGrid
from torch import Tensor


@dataclass(frozen=True, order=True)
class LayerKey:
    """Name of an attention layer of a model.

    Attributes:
        stream: Group of blocks as the host names it, e.g. ``"single"``, ``"double"``.
        index: Position in the group, from 0.
    """

    stream: str
    index: int

    def __str__(self) -> str:
        return f"{self.stream}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> LayerKey:
        """Read ``"single:12"``.

        Raises:
            ValueError: The text is not ``stream:index``.
        """
        stream, separator, index = text.rpartition(":")
        if not separator or not stream or not index.isdecimal():
            raise ValueError(f"a layer key looks like 'single:12', got {text!r}")
        return cls(stream, int(index))


@dataclass(frozen=True)
class TokenLayout:
    """Where text, image and reference tokens lie among the keys; known from the host, never guessed.

    Queries of a self-attention call lie at the same places.

    Attributes:
        length: Number of keys, ``Nk``.
        text: Half-open ranges ``(start, stop)`` of text tokens.
        grids: Grids of generated image tokens in raster order (one per image or frame).
        references: Grids of reference-image tokens; operators treat them as exact unless told otherwise.
    """

    length: int
    text: tuple[tuple[int, int], ...]
    grids: tuple[TokenGrid, ...]
    references: tuple[TokenGrid, ...] = ()

    def __post_init__(self) -> None:
        covered = 0
        spans = [*self.text, *((grid.start, grid.stop) for grid in (*self.grids, *self.references))]
        for start, stop in sorted(spans):
            if start < covered or stop < start or stop > self.length:
                raise ValueError(f"token ranges must not overlap and must end by {self.length}; got {sorted(spans)}")
            covered = stop

    @property
    def image_tokens(self) -> int:
        """Number of generated image tokens."""
        return sum(grid.tokens for grid in self.grids)


@dataclass(frozen=True)
class StepContext:
    """One diffusion step; equal contexts are the same step.

    Attributes:
        sigma: Noise level in the host's units (Flux: 0 to 1).
        cfg_scale: Classifier-free guidance scale; 1.0 = none.
        latent_size: Rows and columns of the latent in latent pixels.
        cond_or_uncond: For each part of the batch 0 = conditional, 1 = unconditional; empty if unknown.
    """

    sigma: float
    cfg_scale: float = 1.0
    latent_size: tuple[int, int] = (0, 0)
    cond_or_uncond: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, init=False)
class AttentionCall:
    """One attention call, after RoPE.

    Attributes:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        scale: Score scale; ``None`` means ``1 / sqrt(D)``.
        key_mask: ``[B, Nk]`` bool, True = keep.
        attn_bias: Added to the scaled scores, broadcastable to ``[B, H, Nq, Nk]``.
        rope: Rotary embedding of the host where it hands it on; ``q`` and ``k`` already carry it.
        layer: Which layer calls; ``None`` if the host does not name its layers.
        step: Which diffusion step; ``None`` if unknown.
        layout: Where which tokens lie; ``None`` if unknown.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    key_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    rope: Tensor | None = field(default=None, repr=False)
    layer: LayerKey | None = None
    step: StepContext | None = None
    layout: TokenLayout | None = None

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        rope: Tensor | None = None,
        layer: LayerKey | None = None,
        step: StepContext | None = None,
        layout: TokenLayout | None = None,
    ) -> None:
        # All fields at once: a frozen dataclass sets them one by one, a tenth of what an installed override costs.
        self.__dict__.update(
            q=q,
            k=k,
            v=v,
            scale=scale,
            key_mask=key_mask,
            attn_bias=attn_bias,
            rope=rope,
            layer=layer,
            step=step,
            layout=layout,
        )


NativeAttention = Callable[[AttentionCall], Tensor]
"""The host's own exact attention: answers a call with ``[B, H, Nq, Dv]``."""


@runtime_checkable
class AttentionHandler(Protocol):
    """Answers attention calls; the one thing a host needs to know."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``call`` with ``[B, H, Nq, Dv]``, itself or by ``native(call)``."""
        ...

    def begin_run(self) -> None:
        """A sampling run starts."""
        ...

    def end_run(self) -> None:
        """The run is over, also when it failed or was interrupted."""
        ...


class AttentionFallback(Exception):
    """A backend that was allowed to run cannot answer this call; native attention takes over.

    Args:
        reason: One sentence that a user can read in the report.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
