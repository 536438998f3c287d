"""Every option of the hybrid backend, and how window and weight follow the noise level."""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.backends.options import check_options, option
from attn_dispatch.backends.qk_norm import QkNorm


@dataclass(frozen=True)
class HybridBackendConfig:
    """Exact attention near by, and a series over few coordinates for the rest.

    Names, order and defaults of the first options are those that saved workflows know; ``recommended`` is advice. The
    attributes are described in their ``help``: see ``options_of``.

    Raises:
        ValueError: An option has the wrong type or is outside its range.
    """

    local_window: int = option(512, "Keys on each side that stay exact, in tokens; 0 = all.", 0, 8192, 1)
    local_window_min: int = option(512, "Window at and below local_window_sigma_low; 0 = all keys.", 0, 8192, 1)
    local_window_max: int = option(512, "Window at and above local_window_sigma_high; 0 = all keys.", 0, 8192, 1)
    local_window_sigma_low: float = option(0.0, "Noise level up to which the window is the smallest.", 0.0, 50.0, 0.01)
    local_window_sigma_high: float = option(
        0.0,
        "Noise level from which the window is the largest; not above local_window_sigma_low = no schedule.",
        0.0,
        50.0,
        0.01,
    )
    local_chunk: int = option(256, "Queries in a row that share the union of their windows.", 1, 10**9, 1)
    prefix_tokens: int = option(0, "First tokens that every query sees exactly.", 0, 8192, 1)
    global_dim: int = option(16, "Coordinates to which queries and keys are reduced for the rest.", 1, 128, 1)
    global_P: int = option(2, "Terms of the series for the rest. Odd values stay positive.", 1, 4, 1)
    global_weight: float = option(0.1, "Weight of the rest; with combine='shared' 1 is attention.", 0.0, 4.0, 0.01)
    global_sigma_low: float = option(0.0, "Noise level up to which the weight is full.", 0.0, 50.0, 0.01)
    global_sigma_high: float = option(
        0.0, "Noise level from which the weight is 0; not above global_sigma_low = no schedule.", 0.0, 50.0, 0.01
    )
    global_scale_mul: float = option(1.0, "Multiplies the scores of the series.", 0.0, 4.0, 0.01)
    global_norm_power: float = option(
        0.0, "Divide reduced queries and keys by this power of their norm; 0 = off.", 0.0, 1.0, 0.05
    )
    global_norm_clip: float = option(0.0, "Largest norm of reduced queries and keys; 0 = off.", 0.0, 100.0, 0.5)
    use_pca: bool = option(
        True, "Fit the coordinates to each layer in each run; off: the first channels of queries and keys."
    )
    pca_samples: int = option(2048, "Tokens to which the coordinates are fitted; 0 = all.", 0, 65536, 256)
    allow_cross_attention: bool = option(True, "Run where queries and keys differ in number.")
    layer_start: int = option(-1, "Run only from this layer on; -1 = from the first.", -1, 512, 1)
    layer_end: int = option(-1, "Run only up to this layer; -1 = to the last.", -1, 512, 1)
    eps: float = option(1e-6, "Added to the norms by which reduced queries and keys are divided.", 1e-12, 1e-2, 1e-6)
    force_fp32: bool = option(True, "Compute the reduced queries and keys in float32.")
    log_steps: bool = option(True, "Log one line for every sampling step.")
    log_quality_stats: bool = option(False, "Compare some queries with exact attention and keep a record of the run.")
    combine: str = option(
        "shared",
        "Near keys and the rest under one denominator, or the rest added to the answer of the window.",
        choices=("shared", "additive"),
    )
    basis: str = option(
        "bilinear",
        "What fitted coordinates keep: the scores, or the variance of queries and keys together.",
        choices=("bilinear", "pca"),
    )
    radius: int = option(
        0,
        "Distance on the image grid, in tokens, that stays exact, instead of a window over the sequence; 0 = off.",
        0,
        64,
        1,
    )
    keep_text: bool = option(True, "Every query sees the text tokens exactly where the host says that they come first.")

    def __post_init__(self) -> None:
        check_options(self)
        if 0 <= self.layer_end < self.layer_start:
            raise ValueError(f"layer_start {self.layer_start} must not be above layer_end {self.layer_end}")

    @classmethod
    def recommended(cls) -> HybridBackendConfig:
        """Return settings that approximate attention: neighbours on the grid, three terms, one denominator."""
        return cls(global_P=3, global_weight=1.0, radius=3, log_steps=False)

    @property
    def low_norm(self) -> QkNorm:
        """What is done to reduced queries and keys."""
        return QkNorm(clip=self.global_norm_clip, power=self.global_norm_power, eps=self.eps)

    def window_at(self, sigma: float | None, keys: int) -> int:
        """Return the window at a noise level.

        Smoothly from ``local_window_max`` to ``local_window_min`` as the noise falls from ``local_window_sigma_high``
        to ``local_window_sigma_low``.

        Args:
            sigma: Noise level in the host's units; ``None`` = unknown, which gives ``local_window``.
            keys: Number of keys; a window of 0 means this.
        """
        low, high = self.local_window_sigma_low, self.local_window_sigma_high
        if sigma is None or high <= low:
            return self.local_window or keys
        smallest, largest = self.local_window_min or keys, self.local_window_max or keys
        share = min(1.0, max(0.0, (high - sigma) / (high - low)))
        return round(largest + (smallest - largest) * share * share * (3.0 - 2.0 * share))

    def weight_at(self, sigma: float | None) -> float:
        """Return the weight of the rest at a noise level.

        From 0 to ``global_weight`` in a straight line as the noise falls from ``global_sigma_high`` to
        ``global_sigma_low``.

        Args:
            sigma: Noise level in the host's units; ``None`` = unknown, which gives the full weight.
        """
        low, high = self.global_sigma_low, self.global_sigma_high
        if sigma is None or high <= low:
            return self.global_weight
        return self.global_weight * min(1.0, max(0.0, (high - sigma) / (high - low)))
