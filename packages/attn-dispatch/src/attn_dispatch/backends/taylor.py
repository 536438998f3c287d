"""Taylor attention as something that a router may choose."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import replace

import torch
from attn_kernels import Impl, Partial, denominator_probe, taylor_attention, taylor_feature_count
from attn_kernels.blocked_cost import taylor_blocked_work, with_denominator_probe
from attn_kernels.cost import AttentionShape, taylor_work
from attn_kernels.device_model import Work
from torch import Tensor

from attn_dispatch.backends.quality import exact_rows, sample_queries
from attn_dispatch.backends.reasons import (
    Reason,
    refuse_cross,
    refuse_layer,
    refuse_mask,
    refuse_shapes,
    refuse_sigma,
)
from attn_dispatch.backends.taylor_config import TaylorBackendConfig
from attn_dispatch.backends.taylor_memory import MemoryReserve, Reservation
from attn_dispatch.backends.taylor_stats import StepRecorder, StepTally, TaylorStepStats, diagnose
from attn_dispatch.backends.taylor_tuning import TaylorTuner
from attn_dispatch.call import AttentionCall, AttentionFallback

logger = logging.getLogger(__name__)

_DEFAULT = TaylorBackendConfig()
_DIAGNOSED_TOKENS = 64


class TaylorBackend:
    """Answers calls with ``exp`` replaced by its truncated series.

    Self and cross attention, any layer, named or not, key masks; no layout is needed. Where the options ask for
    checks of denominators (``early_probe``, ``fallback_on_negative``), each check reads one number from the device
    per call and may raise ``AttentionFallback``. Without them nothing waits for the device, and a query with a bad
    denominator is answered with NaN, never with a wrong number; an odd ``P`` with plain coefficients has none.

    Every reason begins with one of the words of ``Reason``.

    Args:
        config: The options.
        reserve: How the host frees device memory; without it ``memory_reserve`` has nobody to ask.
        seed: Seed of sampled queries.
        name: Name in reports.

    Attributes:
        enabled: False = refuse every call; may be changed between calls.
        tuner: Which settings auto-tune chose.
    """

    def __init__(
        self,
        config: TaylorBackendConfig = _DEFAULT,
        *,
        reserve: MemoryReserve | None = None,
        seed: int = 0,
        name: str = "taylor",
    ) -> None:
        self.config = config
        self.name = name
        self.enabled = True
        self.tuner = TaylorTuner(config)
        self._operator = config.operator()
        self._reservation = Reservation(config, reserve)
        self._recorder = StepRecorder(config)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._logged: set[str] = set()
        self._answered = 0

    @property
    def steps(self) -> deque[TaylorStepStats]:
        """Finished sampling steps, oldest first; complete after ``end_run``."""
        return self._recorder.steps

    def begin_run(self) -> None:
        """Start anew: samples, tuned settings, what was logged."""
        self._generator.manual_seed(self._seed)
        self.tuner.begin_run()
        self._reservation.begin_run()
        self._logged.clear()
        self._answered = 0

    def end_run(self) -> None:
        """Close the last step and report what auto-tune chose."""
        self._recorder.end_run()
        self.tuner.end_run()

    def refuses(self, call: AttentionCall) -> str | None:
        """Say in one sentence why the series cannot answer the call; ``None`` if it can."""
        reason = self._refusal(call)
        if reason is not None:
            self._fell_back(call, reason)
        return reason

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, Nq, Dv]``.

        Raises:
            AttentionFallback: A check of denominators failed.
        """
        try:
            return self._answer(call)
        except AttentionFallback as fallback:
            self._fell_back(call, fallback.reason)
            raise

    def work(self, call: AttentionCall) -> Work | None:
        """Return what answering the call takes, for ``PaysOff``: in the form that runs there, with its block sizes."""
        config, shape, device = self.config, AttentionShape.of(call.q, call.k, call.v), call.q.device.type
        if config.fused and device == "cuda":
            return taylor_work(shape, terms=config.P, blocks=config.sub_head_blocks)
        if self._refuse_widths(call) is not None:
            return None
        blocks = config.sub_head_blocks
        width, columns = shape.width // blocks, shape.value_width // blocks
        cut = replace(shape, heads=shape.heads * blocks, width=width, value_width=columns)
        work = taylor_blocked_work(cut, terms=config.P, config=self._operator, device=device)
        return with_denominator_probe(work, cut, queries=config.probe_samples) if config.early_probe else work

    def effective(self, call: AttentionCall) -> AttentionCall:
        """Return the call whose exact answer the series approximates: norms and score factor changed.

        With sub-head blocks no call of these shapes has that answer; then it is ``call`` itself, and ``quality_eff``
        of the step tells the distance from the blocks' exact attention.
        """
        return call if self.config.sub_head_blocks > 1 else self._changed(call, self.tuner.current(call))

    def _refusal(self, call: AttentionCall) -> str | None:
        config = self.config
        if not self.enabled:
            return Reason.DISABLED.because("the backend is switched off")
        reason = refuse_shapes(call) or refuse_cross(call, config.allow_cross_attention)
        if reason is not None:
            return reason
        tokens = max(call.q.shape[2], call.k.shape[2])
        if tokens < config.min_tokens:
            return Reason.MIN_TOKENS.because(f"{tokens} tokens are fewer than {config.min_tokens}")
        return (
            refuse_mask(call)
            or self._refuse_widths(call)
            or refuse_sigma(call, config.taylor_sigma_max)
            or refuse_layer(call, config.taylor_layer_start, config.taylor_layer_end)
        )

    def _refuse_widths(self, call: AttentionCall) -> str | None:
        config, blocks = self.config, self.config.sub_head_blocks
        width, columns = call.q.shape[3], call.v.shape[3]
        if width % blocks or columns % blocks:
            return Reason.SUB_HEADS.because(f"heads {width} and {columns} wide cannot be cut into {blocks} blocks")
        width //= blocks
        if width > config.max_head_dim:
            return Reason.HEAD_DIM_LARGE.because(f"{width} is more than max_head_dim={config.max_head_dim}")
        features = taylor_feature_count(width, config.P)
        if features > config.max_feature_dim_R:
            return Reason.FEATURE_DIM_LARGE.because(
                f"R={features} is more than max_feature_dim_R={config.max_feature_dim_R} "
                f"(head_dim={width}, P={config.P}, sub_head_blocks={blocks})"
            )
        return None

    def _answer(self, call: AttentionCall) -> Tensor:
        config = self.tuner.config_for(call, self._attend)
        changed = self._changed(call, config)
        self._log_shapes(call)
        self._reservation.ask(changed)
        if config.early_probe:
            self._probe(changed)
        partial = self._series(changed)
        output = _join_heads(partial.out, config.sub_head_blocks)
        if config.fallback_on_negative:
            output = self._check(call, changed, output, partial.lse)
        tally = self._recorder.step(call)
        tally.answered += 1
        self._answered += 1
        if config.log_steps:
            tally.add_denominators(partial.lse)
        if config.quality_check and (self._answered - 1) % config.quality_check_log_every == 0:
            self._compare(tally, call, changed, output)
        return output.to(call.q.dtype)

    def _changed(self, call: AttentionCall, config: TaylorBackendConfig) -> AttentionCall:
        """Cut heads into blocks and change norms, score factor and dtype."""
        blocks = config.sub_head_blocks
        q, k, v = (_split_heads(x, blocks) for x in (call.q, call.k, call.v))
        if config.force_fp32:
            q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        if config.qk_norm.active(None if call.step is None else call.step.sigma):
            q, k = config.qk_norm.apply(q), config.qk_norm.apply(k)
        # Blocks are scored like heads of their width, so that their logits spread as those of the head.
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale * blocks**0.5
        return replace(call, q=q, k=k, v=v, scale=scale * config.scale_mul)

    def _attend(self, call: AttentionCall, config: TaylorBackendConfig) -> Partial:
        """Answer a whole call under other options than the backend's own."""
        partial = self._series(self._changed(call, config))
        return Partial(_join_heads(partial.out, config.sub_head_blocks), partial.lse)

    def _series(self, changed: AttentionCall) -> Partial:
        config = self.config
        partial = taylor_attention(
            changed.q,
            changed.k,
            changed.v,
            terms=config.P,
            scale=changed.scale,
            key_mask=changed.key_mask,
            config=self._operator,
            impl=self._impl(changed),
        )
        if config.denom_fp32:
            return partial
        return Partial(partial.out * _rounding(partial.lse, changed.q.dtype), partial.lse)

    def _impl(self, changed: AttentionCall) -> Impl:
        if self.config.fused:
            return Impl.AUTO
        wants_gradient = any(x.requires_grad for x in (changed.q, changed.k, changed.v))
        return Impl.REFERENCE if torch.is_grad_enabled() and wants_gradient else Impl.BLOCKED

    def _probe(self, changed: AttentionCall) -> None:
        """Look at the denominators of a few queries before the values are summed.

        Raises:
            AttentionFallback: Too many of them are bad, or they are not numbers.
        """
        config, device = self.config, changed.q.device
        index = sample_queries(config.probe_samples, changed.q.shape[2], self._generator)
        probe = denominator_probe(
            changed.q,
            changed.k,
            terms=config.P,
            scale=changed.scale,
            key_mask=changed.key_mask,
            config=self._operator,
            queries=index.to(device, non_blocking=True),
            impl=Impl.AUTO if config.fused else Impl.REFERENCE,
        )
        invalid, below = torch.stack(
            [probe.minimum.isnan().any().float(), probe.fraction_below.float().mean()]
        ).tolist()
        if invalid:
            raise AttentionFallback(Reason.DENOMINATOR_INVALID.because("a sampled denominator is not a number"))
        if config.fallback_on_negative and below > config.denom_fallback_frac_limit:
            raise AttentionFallback(_too_small(below))

    def _check(self, call: AttentionCall, changed: AttentionCall, output: Tensor, lse: Tensor) -> Tensor:
        """Look at every denominator; answer a tolerated share of bad ones exactly.

        Raises:
            AttentionFallback: More of them are bad, or q or k is not finite.
        """
        bad = lse.isnan()
        share = float(bad.float().mean())
        if share == 0.0:
            return output
        if not bool(changed.q.isfinite().all() & _unmasked_finite(changed)):
            raise AttentionFallback(Reason.DENOMINATOR_INVALID.because("queries or keys are not finite"))
        if share > self.config.denom_fallback_frac_limit:
            raise AttentionFallback(_too_small(share))
        per_head = bad.reshape(*call.q.shape[:2], -1, bad.shape[2]).any(dim=2)
        index = per_head.flatten(0, 1).any(dim=0).nonzero().squeeze(1)
        exact = exact_rows(call, index).to(output.dtype)
        rows = torch.where(per_head.index_select(2, index).unsqueeze(-1), exact, output.index_select(2, index))
        return output.index_copy(2, index, rows)

    def _compare(self, tally: StepTally, call: AttentionCall, changed: AttentionCall, output: Tensor) -> None:
        """Compare sampled queries with exact attention, of the call and of the changed scores."""
        config, device = self.config, call.q.device
        places = sample_queries(config.quality_check_samples, call.q.shape[2], self._generator)
        index = places.to(device, non_blocking=True)
        with torch.no_grad():
            rows = output.index_select(2, index)
            tally.raw.add(rows, exact_rows(call, index))
            tally.eff.add(rows, _join_heads(exact_rows(changed, index), config.sub_head_blocks))
            if tally.diag is None:
                queries, keys = (
                    sample_queries(_DIAGNOSED_TOKENS, x.shape[2], self._generator).to(device, non_blocking=True)
                    for x in (call.q, call.k)
                )
                scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
                changed_scale = 1.0 if changed.scale is None else changed.scale
                raw = diagnose(call.q, call.k, scale, queries, keys)
                tally.diag = torch.stack([raw, diagnose(changed.q, changed.k, changed_scale, queries, keys)])

    def _fell_back(self, call: AttentionCall, reason: str) -> None:
        word = reason.partition(":")[0]
        self._recorder.step(call).reasons[word] += 1
        if self.config.log_fallbacks and word not in self._logged:
            self._logged.add(word)
            logger.warning("Taylor attention leaves calls to exact attention: %s", reason)

    def _log_shapes(self, call: AttentionCall) -> None:
        if self.config.log_shapes and "shapes" not in self._logged:
            self._logged.add("shapes")
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", call.q), ("k", call.k), ("v", call.v)))
            logger.info("Taylor attention: %s, %s on %s", shapes, call.q.dtype, call.q.device)


def _split_heads(x: Tensor, blocks: int) -> Tensor:
    """Cut ``[B, H, N, D]`` into ``[B, H * blocks, N, D / blocks]``."""
    return x if blocks == 1 else x.reshape(*x.shape[:3], blocks, -1).transpose(2, 3).flatten(1, 2)


def _join_heads(x: Tensor, blocks: int) -> Tensor:
    """Undo ``_split_heads``."""
    return x if blocks == 1 else x.reshape(x.shape[0], -1, blocks, *x.shape[2:]).transpose(2, 3).flatten(3)


def _unmasked_finite(call: AttentionCall) -> Tensor:
    """Whether every key that may be seen is finite, 0-d."""
    finite = call.k.isfinite().all(dim=3).all(dim=1)
    return (finite if call.key_mask is None else finite | ~call.key_mask).all()


def _rounding(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """By what the answers change when the denominator is rounded to the precision of ``dtype``, ``[..., 1]``.

    Only the mantissa is rounded, so that no denominator is too large for the dtype.
    """
    octaves = lse.float() / math.log(2.0)
    mantissa = torch.exp2(octaves - octaves.floor())
    return torch.where(lse == -torch.inf, 1.0, mantissa / mantissa.to(dtype).float()).unsqueeze(-1)


def _too_small(share: float) -> str:
    # Two digits, so that a report has few sentences of this kind.
    percent = float(f"{100 * share:.2g}")
    return Reason.DENOMINATOR_SMALL.because(f"denominator below eps in {percent:g}% of queries")
