"""Near-far attention as something that a router may choose: needs no training, only the layout of the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from attn_kernels import Impl, NearFarConfig, TokenGrid, near_far_attention, near_far_keys
from attn_kernels.cost import AttentionShape, near_far_work
from attn_kernels.device_model import Work
from torch import Tensor

from attn_dispatch.backends.reasons import refuse_layout, refuse_shapes
from attn_dispatch.call import AttentionCall, LayerKey, TokenLayout
from attn_dispatch.guards import LayerRange

_DEFAULT = NearFarConfig()


@dataclass(frozen=True)
class NearFarRule:
    """What near-far keeps exact in some layers at some noise levels.

    Attributes:
        config: The settings there; ``None`` = the host's own attention answers.
        layers: The layers meant, as a range or by name; ``None`` = all, also unnamed ones.
        sigma: Half-open range ``(low, high)`` of noise levels meant, in the host's units; the default means all, also
            unknown ones.
    """

    config: NearFarConfig | None
    layers: LayerRange | tuple[LayerKey, ...] | None = None
    sigma: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        low, high = self.sigma
        if not 0 <= low < high:
            raise ValueError(f"sigma must be a range (low, high) with 0 <= low < high, got {self.sigma}")

    def covers(self, call: AttentionCall) -> bool:
        """Whether the rule is meant for this call."""
        if isinstance(self.layers, LayerRange):
            if self.layers(call) is not None:
                return False
        elif self.layers is not None and call.layer not in self.layers:
            return False
        if self.sigma == (0.0, math.inf):
            return True
        return call.step is not None and self.sigma[0] <= call.step.sigma < self.sigma[1]


class NearFarBackend:
    """Answers self-attention by near-far attention, wherever the host says which tokens form an image.

    Text, first or last, and every other token outside the grids stay exact. Frames of a video are further grids. The
    first rule that covers a call decides; without one ``config`` does.

    Args:
        config: What stays exact where no rule says otherwise; ``None`` = the host's own attention answers there.
        rules: Settings per layer and noise level, in order of preference.
        references: ``"exact"`` = tokens of reference images are exact keys of every query; ``"grids"`` = they are
            cut into tiles like the image, which is cheaper with many references.
        impl: Which implementation of the operator.
        name: Name in reports.

    Raises:
        ValueError: ``references`` or ``impl`` is unknown.
    """

    def __init__(
        self,
        config: NearFarConfig | None = _DEFAULT,
        rules: Sequence[NearFarRule] = (),
        *,
        references: Literal["exact", "grids"] = "exact",
        impl: Impl | str = Impl.AUTO,
        name: str = "near_far",
    ) -> None:
        if references not in ("exact", "grids"):
            raise ValueError(f"references must be 'exact' or 'grids', got {references!r}")
        if impl not in tuple(Impl):
            raise ValueError(f"impl must be one of {', '.join(Impl)}, got {impl!r}")
        self.config = config
        self.rules = tuple(rules)
        self.references = references
        self.impl = Impl(impl)
        self.name = name

    def config_for(self, call: AttentionCall) -> NearFarConfig | None:
        """Return the settings for a call; ``None`` = the host's own attention answers."""
        for rule in self.rules:
            if rule.covers(call):
                return rule.config
        return self.config

    def grids_for(self, layout: TokenLayout) -> tuple[TokenGrid, ...]:
        """Return the grids that are cut into tiles."""
        return (*layout.grids, *layout.references) if self.references == "grids" else layout.grids

    def refuses(self, call: AttentionCall) -> str | None:
        """Say in one sentence why near-far cannot answer the call; ``None`` if it can."""
        reason = refuse_shapes(call) or refuse_layout(call)
        if reason is not None or call.layout is None:
            return reason
        if call.attn_bias is not None:
            return "near-far attention takes no attention bias"
        if call.q.shape[2] != call.k.shape[2]:
            return "near-far attention answers self-attention only"
        config, grids, length = self.config_for(call), self.grids_for(call.layout), call.layout.length
        if config is None:
            return "a rule keeps this layer and noise level exact"
        if not _saves_keys(grids, length, config):
            return f"near-far attention with these settings meets every one of {length} tokens"
        return None

    def work(self, call: AttentionCall) -> Work | None:
        """Return what answering the call takes, for ``PaysOff``; ``None`` where it is not answered."""
        config = self.config_for(call)
        if call.layout is None or config is None:
            return None
        return _work(AttentionShape.of(call.q, call.k, call.v), self.grids_for(call.layout), config)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, N, Dv]``.

        Raises:
            ValueError: ``refuses`` has a reason.
        """
        config = self.config_for(call)
        if call.layout is None or config is None:
            raise ValueError(f"near-far attention cannot answer this call: {self.refuses(call)}")
        partial = near_far_attention(
            call.q,
            call.k,
            call.v,
            grids=self.grids_for(call.layout),
            config=config,
            scale=call.scale,
            key_mask=call.key_mask,
            impl=self.impl,
        )
        return partial.out


@lru_cache(maxsize=256)
def _saves_keys(grids: tuple[TokenGrid, ...], length: int, config: NearFarConfig) -> bool:
    return near_far_keys(grids, length, config) < length


@lru_cache(maxsize=256)
def _work(shape: AttentionShape, grids: tuple[TokenGrid, ...], config: NearFarConfig) -> Work:
    return near_far_work(shape, grids=grids, config=config)
