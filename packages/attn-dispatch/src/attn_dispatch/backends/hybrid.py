"""Hybrid attention as something that a router may choose: exact near by, a series of low rank for the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from attn_kernels import (
    Partial,
    Projection,
    TokenGrid,
    fit_projection,
    hybrid_attention,
    window_attention,
    window_attention_2d,
)
from attn_kernels.cost import AttentionShape, attend_work, hybrid_work, window_keys, window_keys_2d
from attn_kernels.device_model import Work
from torch import Tensor

from attn_dispatch.backends.hybrid_config import HybridBackendConfig
from attn_dispatch.backends.hybrid_record import Meta, RunRecord
from attn_dispatch.backends.quality import Quality, exact_rows, sample_queries
from attn_dispatch.backends.reasons import (
    Reason,
    refuse_cross,
    refuse_layer,
    refuse_layout,
    refuse_mask,
    refuse_shapes,
)
from attn_dispatch.call import AttentionCall, LayerKey

logger = logging.getLogger(__name__)

_DEFAULT = HybridBackendConfig()
_COMPARED_QUERIES = 8


class HybridBackend:
    """Answers calls with exact attention to near keys and a series over few coordinates for the rest.

    Near keys are a window over the sequence, or with ``radius`` a neighbourhood on the image grid that the layout
    names. The coordinates are fitted to the first call of each layer in each run and serve that layer alone; a layer
    without a name is fitted in every call. q and k carry their rotary positions in both parts. Fitting may wait for
    the device, nothing else does. With an even ``global_P`` a query may have no positive denominator: its answer is
    NaN, never a wrong number.

    Args:
        config: The options.
        record_path: Where ``log_quality_stats`` appends one line of JSON per run; ``None`` = only the log.
        meta: Facts that go into that line, e.g. ``model_class``.
        seed: Seed of sampled tokens.
        name: Name in reports.

    Attributes:
        enabled: False = refuse every call; may be changed between calls.
        quality: Distance from exact attention in the last run; ``None`` if not measured.
        projections: Coordinates fitted in the current run.
    """

    def __init__(
        self,
        config: HybridBackendConfig = _DEFAULT,
        *,
        record_path: Path | None = None,
        meta: Meta | None = None,
        seed: int = 0,
        name: str = "hybrid",
    ) -> None:
        self.config = config
        self.name = name
        self.enabled = True
        self.quality: Quality | None = None
        self.projections: dict[LayerKey, Projection] = {}
        self._record = RunRecord(config, record_path, meta)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._step: tuple[float | None, int, float] | None = None
        self._calls = 0

    def begin_run(self) -> None:
        """Start anew: fitted coordinates, samples, record."""
        self.projections.clear()
        self._generator.manual_seed(self._seed)
        self._record.begin_run()
        self.quality = None
        self._calls = 0

    def end_run(self) -> None:
        """Log and record what was measured, and let go of the fitted coordinates."""
        self._log_step()
        self.quality = self._record.end_run()
        self.projections.clear()

    def refuses(self, call: AttentionCall) -> str | None:
        """Say in one sentence why hybrid attention cannot answer the call; ``None`` if it can."""
        config = self.config
        if not self.enabled:
            return Reason.DISABLED.because("the backend is switched off")
        reason = (
            refuse_shapes(call)
            or refuse_cross(call, config.allow_cross_attention)
            or refuse_mask(call)
            or refuse_layer(call, config.layer_start, config.layer_end)
        )
        if reason is not None:
            return reason
        return self._refuse_grid(call) if config.radius else self._refuse_window(call)

    def work(self, call: AttentionCall) -> Work | None:
        """Return what answering the call takes, for ``PaysOff``; ``None`` where ``radius`` finds no grid."""
        config, shape = self.config, AttentionShape.of(call.q, call.k, call.v)
        if config.radius and (call.layout is None or not call.layout.grids):
            return None
        if config.radius:
            near = window_keys_2d(shape.keys, self._grids(call), config.radius)
        else:
            # Queries of a chunk see the union of their windows.
            reach = self._window(call) + min(config.local_chunk, shape.queries) // 2
            near = window_keys(shape.keys, reach, self._prefix(call))
        if self._weight(call) == 0:
            return attend_work("window", shape, near)
        fused = call.q.is_cuda
        return hybrid_work(shape, near_keys=near, rank=self._rank(call), terms=config.global_P, fused=fused)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, Nq, Dv]``."""
        window, weight = self._window(call), self._weight(call)
        self._count(call, window, weight)
        partial = self._near(call, window) if weight == 0 else self._hybrid(call, window, weight)
        output = partial.out.to(call.q.dtype)
        if self.config.log_quality_stats:
            self._record.note(call, window, weight)
            places = sample_queries(_COMPARED_QUERIES, call.q.shape[2], self._generator)
            index = places.to(call.q.device, non_blocking=True)
            with torch.no_grad():
                self._record.tally.add(output.index_select(2, index), exact_rows(call, index))
        return output

    def _refuse_window(self, call: AttentionCall) -> str | None:
        longest = max(call.q.shape[2], call.k.shape[2])
        if self._window(call) >= longest - 1 and self._near_is_all(call):
            return f"a window of {self._window(call)} covers every key, so exact attention answers"
        return None

    def _refuse_grid(self, call: AttentionCall) -> str | None:
        reason = refuse_layout(call)
        if reason is not None:
            return reason
        if call.q.shape[2] != call.k.shape[2]:
            return "a neighbourhood on the image grid is of self-attention only"
        grids = self._grids(call)
        covered = len(grids) == 1 and self.config.radius >= max(grids[0].rows, grids[0].columns) - 1
        if covered and self._near_is_all(call):
            return f"a radius of {self.config.radius} covers the image grid, so exact attention answers"
        return None

    def _near_is_all(self, call: AttentionCall) -> bool:
        """Whether exact near keys leave nothing to add, if they are all keys."""
        return self.config.combine == "shared" or self._weight(call) == 0

    def _window(self, call: AttentionCall) -> int:
        return self.config.window_at(_sigma(call), call.k.shape[2])

    def _weight(self, call: AttentionCall) -> float:
        return self.config.weight_at(_sigma(call))

    def _grids(self, call: AttentionCall) -> tuple[TokenGrid, ...]:
        return () if call.layout is None else call.layout.grids

    def _prefix(self, call: AttentionCall) -> int:
        """Number of leading tokens that every query sees: those asked for, and text that comes first."""
        prefix = self.config.prefix_tokens
        layout = call.layout
        if self.config.keep_text and layout is not None and layout.length == call.k.shape[2]:
            prefix = max([prefix, *(stop for start, stop in layout.text if start == 0)])
        return min(prefix, call.k.shape[2])

    def _rank(self, call: AttentionCall) -> int:
        return min(self.config.global_dim, call.q.shape[3])

    def _near(self, call: AttentionCall, window: int) -> Partial:
        """Attend to near keys alone."""
        config = self.config
        if config.radius:
            return window_attention_2d(
                call.q,
                call.k,
                call.v,
                grids=self._grids(call),
                radius=config.radius,
                scale=call.scale,
                key_mask=call.key_mask,
            )
        return window_attention(
            call.q,
            call.k,
            call.v,
            window=window,
            prefix=self._prefix(call),
            chunk=config.local_chunk,
            scale=call.scale,
            key_mask=call.key_mask,
        )

    def _hybrid(self, call: AttentionCall, window: int, weight: float) -> Partial:
        config = self.config
        scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
        flat = config.radius == 0
        return hybrid_attention(
            call.q,
            call.k,
            call.v,
            low=self._low(call),
            low_scale=scale * config.global_scale_mul,
            window=window if flat else None,
            prefix=self._prefix(call) if flat else 0,
            chunk=config.local_chunk if flat else 1,
            grids=() if flat else self._grids(call),
            radius=None if flat else config.radius,
            terms=config.global_P,
            weight=weight,
            combine="additive" if config.combine == "additive" else "shared",
            scale=call.scale,
            key_mask=call.key_mask,
        )

    def _low(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Reduce q and k to few coordinates, each ``[B, H, N, r]``."""
        config, rank = self.config, self._rank(call)
        q, k = call.q, call.k
        if config.use_pca:
            q, k = self._projection(call, rank).apply(q, k)
        else:
            q, k = q[..., :rank], k[..., :rank]
        dtype = torch.promote_types(call.q.dtype, torch.float32) if config.force_fp32 else call.q.dtype
        return config.low_norm.apply(q.to(dtype)), config.low_norm.apply(k.to(dtype))

    def _projection(self, call: AttentionCall, rank: int) -> Projection:
        """Return the coordinates of the call's layer, fitted now if the run has none that fit."""
        known = None if call.layer is None else self.projections.get(call.layer)
        expected = (call.q.shape[1], call.q.shape[3], rank)
        if known is not None and tuple(known.q_basis.shape) == expected and known.q_basis.device == call.q.device:
            return known
        q, k, mask = call.q, call.k, call.key_mask
        if self.config.pca_samples:
            queries, keys = (
                sample_queries(self.config.pca_samples, x.shape[2], self._generator).to(x.device, non_blocking=True)
                for x in (q, k)
            )
            q, k = q.index_select(2, queries), k.index_select(2, keys)
            mask = None if mask is None else mask.index_select(1, keys)
        with torch.no_grad():
            method: Literal["bilinear", "pca"] = "pca" if self.config.basis == "pca" else "bilinear"
            fitted = fit_projection(q, k, rank=rank, method=method, key_mask=mask)
        if call.layer is not None:
            self.projections[call.layer] = fitted
        return fitted

    def _count(self, call: AttentionCall, window: int, weight: float) -> None:
        """Count the call in its sampling step, and log the step before where one ends."""
        sigma = _sigma(call)
        if self._step is not None and sigma != self._step[0]:
            self._log_step()
        self._step = (sigma, window, weight)
        self._calls += 1

    def _log_step(self) -> None:
        if self._calls and self._step is not None and self.config.log_steps:
            sigma, window, weight = self._step
            near = f"radius={self.config.radius}" if self.config.radius else f"window={window}"
            logger.info(
                "Hybrid step stats sigma=%s calls=%d %s weight=%.4g combine=%s P=%d",
                "unknown" if sigma is None else format(sigma, ".4g"),
                self._calls,
                near,
                weight,
                self.config.combine,
                self.config.global_P,
            )
        self._calls = 0


def _sigma(call: AttentionCall) -> float | None:
    return None if call.step is None else call.step.sigma
