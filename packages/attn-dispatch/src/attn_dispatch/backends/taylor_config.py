"""Every option of the Taylor backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_kernels import TaylorConfig

from attn_dispatch.backends.options import check_options, option
from attn_dispatch.backends.qk_norm import QkNorm


@dataclass(frozen=True)
class TaylorBackendConfig:
    """What the Taylor backend computes, where it runs, what it checks and what it tells.

    Names, order and defaults are those that saved workflows know. They are no advice: four sub-head blocks define
    another function than attention, and an even ``P`` needs its denominators checked. ``recommended`` is advice.

    The attributes are described in their ``help``: see ``options_of``.

    Raises:
        ValueError: An option has the wrong type or is outside its range, or the lower end of a range to search is
            above its upper end.
    """

    P: int = option(4, "Number of terms of the series; the highest degree is P - 1. Odd values stay positive.", 1, 8, 1)
    min_tokens: int = option(100, "Run only where queries or keys are at least this many.", 0, 200000, 1)
    max_feature_dim_R: int = option(370000, "Run only with at most this many features of a head.", 1, 10**9, 1)
    block_size_q: int = option(
        32, "Largest number of queries read out at a time by the torch form: little memory. 512 is fast.", 1, 8192, 1
    )
    block_size_k: int = option(
        16, "Largest number of keys summed at a time by the torch form: little memory. 512 is fast.", 1, 8192, 1
    )
    eps: float = option(
        1e-6, "A denominator counts as bad up to this share of the weight of all keys.", 1e-12, 1e-2, 1e-6
    )
    fallback_on_negative: bool = option(
        True, "Check every denominator and use exact attention where they are bad. Waits for the device once a call."
    )
    allow_cross_attention: bool = option(True, "Run where queries and keys differ in number.")
    max_head_dim: int = option(128, "Run only on heads (or sub-head blocks) of at most this width.", 1, 512, 1)
    sub_head_blocks: int = option(
        4, "Cut every head into this many narrow heads: fewer features, but another function than attention.", 1, 16, 1
    )
    qk_normalize: bool = option(False, "Give queries and keys norm 1; clip and power are then not used.")
    qk_norm_clip: float = option(0.0, "Largest norm of queries and keys; 0 = off.", 0.0, 100.0, 0.5)
    qk_norm_power: float = option(0.0, "Divide queries and keys by this power of their norm; 0 = off.", 0.0, 1.0, 0.05)
    qk_norm_sigma_max: float = option(
        0.0, "Change the norms only at noise levels up to this; 0 = always.", 0.0, 50.0, 0.01
    )
    scale_mul: float = option(1.0, "Multiplies the scores.", 0.0, 4.0, 0.05)
    force_fp32: bool = option(False, "Compute from float32 queries, keys and values. Sums are float32 in any case.")
    memory_reserve: bool = option(True, "Ask the host to free device memory for what a call will need.")
    memory_reserve_factor: float = option(1.1, "Ask for this many times the estimate.", 1.0, 4.0, 0.05)
    memory_reserve_log: bool = option(True, "Log the estimates.")
    early_probe: bool = option(
        True, "Check the denominators of some queries before the values are summed. Waits for the device once a call."
    )
    probe_samples: int = option(16, "Queries checked by the early probe.", 1, 64, 1)
    denom_fp32: bool = option(
        True, "Divide by float32 denominators; off: by denominators rounded to the precision of the queries."
    )
    denom_fallback_frac_limit: float = option(
        0.0,
        "Share of queries whose denominators may be bad before the call falls back; those few are answered exactly.",
        0.0,
        1.0,
        0.0001,
    )
    fused_kernel: bool = option(False, "Use the Triton kernels where they can run, in chunks of features.")
    fused_full_kernel: bool = option(
        False, "Use the Triton kernels where they can run, with the sums of all features held at once."
    )
    fused_feature_chunk_size: int = option(8192, "Features held at a time with fused_kernel.", 128, 200000, 128)
    fused_value_chunk_size: int = option(0, "Value columns held at a time with fused_kernel; 0 = all.", 0, 4096, 32)
    s_store_bf16: bool = option(False, "Hold the summed values in bfloat16 between keys and queries.")
    taylor_sigma_max: float = option(0.0, "Run only at noise levels up to this; 0 = at all.", 0.0, 50.0, 0.01)
    taylor_layer_start: int = option(-1, "Run only from this layer on; -1 = from the first.", -1, 512, 1)
    taylor_layer_end: int = option(-1, "Run only up to this layer; -1 = to the last.", -1, 512, 1)
    auto_tune: bool = option(False, "Search norm power, norm clip and score factor per layer in the first steps.")
    auto_tune_steps: int = option(1, "Steps of a run in which to search.", 0, 4, 1)
    auto_tune_candidates: int = option(8, "Settings drawn per step, beside the one in use.", 1, 32, 1)
    auto_tune_quality_samples: int = option(4, "Queries on which a setting is judged.", 1, 32, 1)
    auto_tune_seed: int = option(0, "Seed of the settings drawn.", 0, 100000, 1)
    auto_tune_qk_norm_power_min: float = option(0.2, "Smallest norm power drawn.", 0.0, 1.0, 0.05)
    auto_tune_qk_norm_power_max: float = option(0.7, "Largest norm power drawn.", 0.0, 1.0, 0.05)
    auto_tune_qk_norm_clip_min: float = option(8.0, "Smallest norm clip drawn.", 0.0, 100.0, 0.5)
    auto_tune_qk_norm_clip_max: float = option(20.0, "Largest norm clip drawn.", 0.0, 100.0, 0.5)
    auto_tune_scale_mul_min: float = option(0.8, "Smallest score factor drawn.", 0.0, 4.0, 0.05)
    auto_tune_scale_mul_max: float = option(1.0, "Largest score factor drawn.", 0.0, 4.0, 0.05)
    auto_tune_max_tokens: int = option(
        512, "Judge settings on this many queries and keys, spread evenly; 0 = all.", 0, 8192, 1
    )
    quality_check: bool = option(True, "Compare some queries with exact attention and log how far off they are.")
    quality_check_samples: int = option(16, "Queries compared.", 1, 64, 1)
    quality_check_log_every: int = option(1, "Compare in every so many calls.", 1, 1000, 1)
    log_shapes: bool = option(True, "Log the shapes of the first call of a run.")
    log_fallbacks: bool = option(True, "Log each reason for exact attention once a run.")
    log_steps: bool = option(True, "Log one line for every sampling step.")
    centre: bool = option(True, "Expand around the mean query and key: exact, and the largest single gain in accuracy.")
    coefficients: str = option(
        "taylor",
        "Coefficients of the series: 1/p!, or fitted to the spread of each query's scores.",
        choices=("taylor", "hermite"),
    )
    hermite_limit: float = option(
        1.2, "Spread of a query's scores from which fitted coefficients are not used.", 0.0, 10.0, 0.1
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("qk_norm_power", "qk_norm_clip", "scale_mul"):
            low, high = (getattr(self, f"auto_tune_{name}_{end}") for end in ("min", "max"))
            if low > high:
                raise ValueError(f"auto_tune_{name}_min {low} must not be above auto_tune_{name}_max {high}")
        if 0 <= self.taylor_layer_end < self.taylor_layer_start:
            raise ValueError(
                f"taylor_layer_start {self.taylor_layer_start} must not be above taylor_layer_end "
                f"{self.taylor_layer_end}"
            )
        if self.coefficients == "hermite" and not self.centre:
            raise ValueError("coefficients='hermite' are fitted to centred scores; it needs centre=True")

    @classmethod
    def recommended(cls) -> TaylorBackendConfig:
        """Return settings that approximate attention and never wait for the device.

        Three terms of the whole head, whose denominators cannot become negative, so nothing has to be checked; fused
        where possible, large blocks otherwise, nothing measured or logged.
        """
        return cls(
            P=3,
            sub_head_blocks=1,
            block_size_q=512,
            block_size_k=512,
            fallback_on_negative=False,
            early_probe=False,
            fused_kernel=True,
            quality_check=False,
            log_shapes=False,
            log_steps=False,
        )

    @property
    def qk_norm(self) -> QkNorm:
        """What is done to queries and keys."""
        return QkNorm(
            normalize=self.qk_normalize,
            clip=self.qk_norm_clip,
            power=self.qk_norm_power,
            sigma_max=self.qk_norm_sigma_max,
            eps=self.eps,
        )

    @property
    def fused(self) -> bool:
        """Whether Triton kernels are wanted."""
        return self.fused_kernel or self.fused_full_kernel

    def operator(self) -> TaylorConfig:
        """Return the settings of the operator; sub-head blocks are cut by the backend."""
        streaming = self.fused and not self.fused_full_kernel
        return TaylorConfig(
            centre=self.centre,
            coefficients="hermite" if self.coefficients == "hermite" else "taylor",
            hermite_limit=self.hermite_limit,
            path="full" if self.fused_full_kernel else "streaming" if streaming else "auto",
            feature_chunk=self.fused_feature_chunk_size if streaming else None,
            value_chunk=self.fused_value_chunk_size or None if streaming else None,
            key_chunk=None if self.fused else min(self.block_size_q, self.block_size_k),
            store="bfloat16" if self.s_store_bf16 else "float32",
            eps=self.eps,
        )

    def tuned(self, power: float, clip: float, scale_mul: float) -> TaylorBackendConfig:
        """Return these options with another norm power, norm clip and score factor."""
        return replace(self, qk_norm_power=power, qk_norm_clip=clip, scale_mul=scale_mul)
