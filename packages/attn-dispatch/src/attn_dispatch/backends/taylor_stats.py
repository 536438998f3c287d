"""What the Taylor backend did in each sampling step: counts, denominators, distance from exact attention."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from attn_dispatch.backends.quality import PendingValues, Quality, QualityTally
from attn_dispatch.backends.reasons import Reason
from attn_dispatch.backends.taylor_config import TaylorBackendConfig
from attn_dispatch.call import AttentionCall

logger = logging.getLogger(__name__)

_SUMMARY = (
    "P",
    "qk_normalize",
    "qk_norm_power",
    "qk_norm_clip",
    "qk_norm_sigma_max",
    "scale_mul",
    "sub_head_blocks",
    "max_head_dim",
    "force_fp32",
    "denom_fp32",
    "probe_samples",
    "denom_fallback_frac_limit",
    "fused_kernel",
    "fused_full_kernel",
    "fused_feature_chunk_size",
    "fused_value_chunk_size",
    "s_store_bf16",
    "taylor_sigma_max",
    "taylor_layer_start",
    "taylor_layer_end",
)
DIAGNOSED = ("q_norm_raw", "k_norm_raw", "qk_raw", "q_norm_eff", "k_norm_eff", "qk_eff")
"""What ``diagnose`` describes."""

_QUANTILES = (0.5, 0.9, 0.99)
_SPREAD = ("min", "mean", "p50", "p90", "p99", "max")


@dataclass(frozen=True)
class DenominatorStats:
    """Denominators of a step, estimates of ``sum_j exp(score)``.

    Attributes:
        min: Smallest good one.
        max: Largest good one.
        sum: Sum of the good ones.
        count: Number of denominators, one per head (or sub-head block) and query.
        le_eps: How many of them were bad.
        blocks: Number of calls.
    """

    min: float
    max: float
    sum: float
    count: int
    le_eps: int
    blocks: int


@dataclass(frozen=True)
class TaylorStepStats:
    """One sampling step.

    Attributes:
        sigma: Noise level in the host's units; ``None`` if unknown.
        calls: Calls that the backend was asked about and that no guard kept from it.
        taylor_calls: Calls it answered; a call counts once, whatever its sub-head blocks.
        fallback_calls: Calls it refused or gave back.
        denom_fallbacks: How many of them for bad denominators.
        fallback_reasons: First word of the reason to number of calls.
        den_stats: Denominators of the answered calls; ``None`` without any.
        quality_raw: Distance from attention as the model asked for it; ``None`` if not measured.
        quality_eff: Distance from exact attention with the changed norms, score factor and sub-head blocks.
        config: The options that decide the result.
        diag: For each of ``DIAGNOSED`` its spread in one call of the step; empty if not measured.
    """

    sigma: float | None
    calls: int
    taylor_calls: int
    fallback_calls: int
    denom_fallbacks: int
    fallback_reasons: dict[str, int]
    den_stats: DenominatorStats | None
    quality_raw: Quality | None
    quality_eff: Quality | None
    config: dict[str, bool | int | float]
    diag: dict[str, str]

    @property
    def denom_fallback_frac(self) -> float:
        """Share of the calls that fell back for bad denominators."""
        return self.denom_fallbacks / self.calls if self.calls else 0.0

    def to_dict(self) -> dict[str, object]:
        """Everything, as values that ``json`` can write; ``quality`` holds the sums behind ``quality_raw``."""
        raw = self.quality_raw
        sums = None
        if raw is not None:
            sums = {
                "sum_abs": raw.mean_abs * raw.samples,
                "sum_rel": raw.mean_rel * raw.samples,
                "max_abs": raw.max_abs,
                "max_rel": raw.max_rel,
                "samples": raw.samples,
            }
        return {**asdict(self), "denom_fallback_frac": self.denom_fallback_frac, "quality": sums}

    def __str__(self) -> str:
        parts = [
            f"sigma={'unknown' if self.sigma is None else format(self.sigma, '.4g')}",
            f"calls={self.calls} taylor={self.taylor_calls} fallback={self.fallback_calls}",
            f"denom_fallback_frac={self.denom_fallback_frac:.4g}",
            f"reasons={self.fallback_reasons}",
        ]
        if self.den_stats is not None:
            den = self.den_stats
            good = max(1, den.count - den.le_eps)
            parts.append(
                f"den[min={den.min:.4g} max={den.max:.4g} mean={den.sum / good:.4g} "
                f"frac_le_eps={den.le_eps / max(1, den.count):.4g}]"
            )
        for name in ("quality_raw", "quality_eff"):
            figures: Quality | None = getattr(self, name)
            if figures is not None:
                shown = " ".join(f"{key}={value:.4g}" for key, value in figures.to_dict().items())
                parts.append(f"{name}[{shown}]")
        parts.append("config[" + " ".join(f"{key}={value}" for key, value in self.config.items()) + "]")
        if self.diag:
            parts.append("diag[" + " ".join(f"{key}=({value})" for key, value in self.diag.items()) + "]")
        return "Taylor step stats " + " ".join(parts)


class StepTally:
    """Counts one step; figures of tensors stay on the device until ``close``.

    Args:
        sigma: Noise level; ``None`` if unknown.
        config: Options of the backend.
    """

    def __init__(self, sigma: float | None, config: TaylorBackendConfig) -> None:
        self.sigma = sigma
        self.config = config
        self.answered = 0
        self.reasons: Counter[str] = Counter()
        self.raw = QualityTally()
        self.eff = QualityTally()
        self.diag: Tensor | None = None
        self._denominators: Tensor | None = None
        self._count = 0
        self._pending: PendingValues | None = None

    def add_denominators(self, lse: Tensor) -> None:
        """Count the denominators of a call; ``lse`` is ``[B, H, Nq]``, NaN where a denominator is bad."""
        bad = lse.isnan()
        value = lse.float().exp()
        low, high = value.masked_fill(bad, torch.inf).amin(), value.masked_fill(bad, 0).amax()
        new = torch.stack([low, high, value.masked_fill(bad, 0).sum(), bad.sum().float()])
        if self._denominators is not None:
            old = self._denominators.to(new.device)
            new = torch.stack([torch.minimum(old[0], low), torch.maximum(old[1], high), *(old[2:] + new[2:])])
        self._denominators = new
        self._count += lse.numel()

    def close(self) -> None:
        """Send the figures on their way to the host."""
        den = torch.zeros(4) if self._denominators is None else self._denominators
        diag = torch.zeros(0) if self.diag is None else self.diag.flatten()
        parts = [den, self.raw.values(), self.eff.values(), diag]
        device = next((part.device for part in parts if part.device.type != "cpu"), den.device)
        self._pending = PendingValues(torch.cat([part.to(device) for part in parts]))

    def ready(self) -> bool:
        """Whether ``stats`` would not wait for the device; only after ``close``."""
        return self._pending is not None and self._pending.ready()

    def stats(self) -> TaylorStepStats:
        """Return the figures.

        Raises:
            ValueError: The tally is not closed.
        """
        if self._pending is None:
            raise ValueError("close the step before reading it")
        values = self._pending.read()
        size = QualityTally.size
        den, raw, eff, diag = values[:4], values[4 : 4 + size], values[4 + size : 4 + 2 * size], values[4 + 2 * size :]
        fallbacks = sum(self.reasons.values())
        return TaylorStepStats(
            sigma=self.sigma,
            calls=self.answered + fallbacks,
            taylor_calls=self.answered,
            fallback_calls=fallbacks,
            denom_fallbacks=self.reasons[Reason.DENOMINATOR_SMALL.value],
            fallback_reasons=dict(self.reasons),
            den_stats=DenominatorStats(den[0], den[1], den[2], self._count, int(den[3]), self.answered)
            if self._count
            else None,
            quality_raw=self.raw.figures(raw),
            quality_eff=self.eff.figures(eff),
            config={one.name: getattr(self.config, one.name) for one in fields(self.config) if one.name in _SUMMARY},
            diag=_describe(diag),
        )


class StepRecorder:
    """Counts calls by sampling step; a step ends where the noise level changes or the run ends.

    The figures of a finished step are read when the device has them, at the latest at the end of the run.

    Args:
        config: Options of the backend.
        kept: Steps kept; older ones are forgotten.

    Attributes:
        steps: Finished steps, oldest first, over all runs.
    """

    def __init__(self, config: TaylorBackendConfig, *, kept: int = 1024) -> None:
        self.config = config
        self.steps: deque[TaylorStepStats] = deque(maxlen=kept)
        self._current: StepTally | None = None
        self._closed: deque[StepTally] = deque()

    def step(self, call: AttentionCall) -> StepTally:
        """Return the tally of the call's step, closing the one before."""
        sigma = None if call.step is None else call.step.sigma
        if self._current is None or self._current.sigma != sigma:
            self._close()
            self._current = StepTally(sigma, self.config)
        while self._closed and self._closed[0].ready():
            self._publish(self._closed.popleft())
        return self._current

    def end_run(self) -> None:
        """Close the last step and read what is outstanding; waits for the device."""
        self._close()
        while self._closed:
            self._publish(self._closed.popleft())

    def _close(self) -> None:
        if self._current is not None:
            self._current.close()
            self._closed.append(self._current)
            self._current = None

    def _publish(self, tally: StepTally) -> None:
        stats = tally.stats()
        self.steps.append(stats)
        if self.config.log_steps:
            logger.info("%s", stats)


def diagnose(q: Tensor, k: Tensor, scale: float, queries: Tensor, keys: Tensor) -> Tensor:
    """Describe the norms of sampled queries and keys, and their scores.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        scale: Score scale.
        queries: ``[n]`` int64 on the device of q.
        keys: ``[m]`` int64 on the device of k.

    Returns:
        ``[3, 6]`` float32: query norms, key norms and scores, each by minimum, mean, median, 90 %, 99 % and maximum.
    """
    some_q, some_k = q.index_select(2, queries).float(), k.index_select(2, keys).float()
    scores = scale * some_q @ some_k.transpose(-1, -2)
    rows = []
    for values in (some_q.norm(dim=-1).flatten(), some_k.norm(dim=-1).flatten(), scores.flatten()):
        # By rank, because torch.quantile takes no more than 16 million values.
        ordered = values.sort().values
        places = [int(share * (len(ordered) - 1)) for share in _QUANTILES]
        rows.append(torch.stack([ordered[0], values.mean(), *(ordered[place] for place in places), ordered[-1]]))
    return torch.stack(rows)


def _describe(values: list[float]) -> dict[str, str]:
    """Put the numbers of two ``diagnose`` answers into words."""
    width = len(_SPREAD)
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    shown = (" ".join(f"{name}={value:.4g}" for name, value in zip(_SPREAD, row, strict=True)) for row in rows)
    return dict(zip(DIAGNOSED, shown, strict=False))
