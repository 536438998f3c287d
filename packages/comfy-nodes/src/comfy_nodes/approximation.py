"""One number for how good, and gates that need no attention: the settings of ``ApproximateAttention``."""

import math
from dataclasses import dataclass

from attn_dispatch.backends import HybridBackend, HybridBackendConfig, NearFarBackend, check_options, option
from attn_dispatch.backends.reasons import refuse_layer
from attn_dispatch.call import AttentionCall, TokenLayout
from attn_dispatch.finite import FiniteBackend
from attn_dispatch.guards import NO_LAYER, PaysOff, SigmaBelow
from attn_dispatch.router import AttentionRouter, Guard, Route
from attn_kernels import NearFarConfig

COARSE_TOKENS = 8192
"""Image tokens from which tiles of 8 x 8 cost less than tiles of 4 x 4 for the same error."""

SPEED_UP = 1.1
"""Predicted speed-up from which an approximation runs: predictions were off by up to a tenth near break-even."""


@dataclass(frozen=True)
class ApproximationConfig:
    """What a user chooses; the attributes are described in their ``help``.

    Raises:
        ValueError: An option is outside its range.
    """

    quality: float = option(
        0.5,
        "How close to exact attention: 0 is fastest, 1 is exact attention itself. Every setting in between keeps the "
        "text and the neighbourhood of each image patch exact; a higher one keeps more of the distant image exact.",
        0.0,
        1.0,
        0.05,
    )
    method: str = option(
        "near-far",
        "near-far: exact near by and where it matters, averaged far away; the best error for its time. "
        "hybrid: exact near by, a series for everything far away; further off, for comparison.",
        choices=("near-far", "hybrid"),
    )
    only_if_faster: bool = option(
        True,
        "Approximate only where it is predicted to be faster than exact attention on this device. "
        "Small images stay exact.",
    )
    measure_error: bool = option(
        False,
        "Compare 64 queries of every call with exact attention, for the Attention Report. Costs a few percent of the "
        "time.",
    )
    tile: int = option(
        0,
        "Edge of the tiles that near-far averages, in image tokens (16 pixels of a Flux image each); "
        "0 = chosen by the size of the image.",
        0,
        16,
        1,
    )
    exact_above_sigma: float = option(
        0.0,
        "Keep steps with this noise level or a higher one exact; 0 = none. A Flux run goes from 1 to 0.",
        0,
        50,
        0.01,
    )
    layer_start: int = option(
        -1, "Approximate only from this layer of each stream on; -1 = from the first.", -1, 512, 1
    )
    layer_end: int = option(-1, "Approximate only up to this layer of each stream; -1 = to the last.", -1, 512, 1)
    references: str = option(
        "exact",
        "Reference images: exact keeps each of their tokens, grids cuts them into tiles like the image, which is "
        "cheaper with many of them.",
        choices=("exact", "grids"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        if 0 <= self.layer_end < self.layer_start:
            raise ValueError(f"layer_start {self.layer_start} must not be above layer_end {self.layer_end}")

    @property
    def exact(self) -> bool:
        """Whether exact attention itself is asked for."""
        return self.quality >= 1.0

    def near_far(self, tile: int) -> NearFarConfig:
        """Return the settings of near-far attention for tiles of this edge; their chosen tokens are as many."""
        chosen = 512.0 * self.quality**2
        return NearFarConfig(tile=tile, radius=1, top_k=math.ceil(chosen / tile**2))

    def backend(self) -> "SizedNearFar | HybridBackend":
        """Make who approximates."""
        if self.method == "near-far":
            return SizedNearFar(self)
        near = HybridBackendConfig(global_P=3, global_weight=1.0, radius=1 + round(4 * self.quality), log_steps=False)
        return HybridBackend(near)

    def router(self) -> AttentionRouter:
        """Make the handler: the approximation behind its gates, exact attention where one is closed.

        For exact attention it has nothing to choose from and only measures.
        """
        if self.exact:
            return AttentionRouter()
        backend = self.backend()
        guards: list[Guard] = [LayersBetween(self.layer_start, self.layer_end)]
        if self.exact_above_sigma > 0:
            guards.append(SigmaBelow(self.exact_above_sigma))
        if self.only_if_faster:
            guards.append(PredictedFaster(PaysOff(backend.work, speed_up=SPEED_UP)))
        return AttentionRouter([Route(FiniteBackend(backend), tuple(guards))])


@dataclass(frozen=True)
class LayersBetween:
    """Allow the layers of every stream whose index is within limits; with a limit, no layer without a name.

    Attributes:
        first: First allowed index; below 0 = no limit.
        last: Last allowed index; below 0 = no limit.
    """

    first: int
    last: int

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call's layer is not allowed, or ``None``."""
        if call.layer is None and max(self.first, self.last) >= 0:
            return NO_LAYER
        return refuse_layer(call, self.first, self.last)


@dataclass(frozen=True)
class PredictedFaster:
    """Allow calls that are predicted to pay off; where there is no prediction, exact attention stays.

    Attributes:
        gate: Predicts.
    """

    gate: PaysOff

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call does not pay off, or ``None``."""
        try:
            return self.gate(call)
        except ValueError as error:
            return f"there is no prediction: {error}"


class SizedNearFar(NearFarBackend):
    """Near-far attention whose tiles follow the size of the image, where the options name none.

    Args:
        options: What the user chose.
    """

    def __init__(self, options: ApproximationConfig) -> None:
        fine = options.near_far(options.tile or 4)
        super().__init__(fine, references="grids" if options.references == "grids" else "exact")
        self.coarse = options.near_far(options.tile or 8)

    def config_for(self, call: AttentionCall) -> NearFarConfig | None:
        """Return the settings for a call."""
        layout: TokenLayout | None = call.layout
        large = layout is not None and layout.image_tokens >= COARSE_TOKENS
        return self.coarse if large else super().config_for(call)
