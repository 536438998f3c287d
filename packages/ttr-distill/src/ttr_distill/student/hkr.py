"""The ``hkr`` student: kernel regression with learned features, blended with exact attention over landmarks."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from attn_dispatch import AttentionCall, TokenLayout
from attn_kernels import landmark_attention
from attn_kernels.cost import exact_flops, kernel_regression_flops
from torch import Tensor, nn
from torch.nn import functional

from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention, landmarks_of, logit, required_layout
from ttr_distill.student.blend import ConvexBlend, convex, modulated
from ttr_distill.student.conditioner import SigmaCfgConditioner
from ttr_distill.student.feature_map import KernelFeatureMap, MapDtype, TrainingDtype, validate_feature_dim

Blend = Literal["convex", "additive"]


@dataclass(frozen=True)
class HkrConfig:
    """Settings of the ``hkr`` student.

    ``map_layers=2, split_qk=False, blend="additive", conditioned=False`` with equal ``landmark_minimum`` and
    ``landmark_maximum`` is the older form of it, of checkpoints without a conditioner.

    Attributes:
        feature_dim: Number of features F, a multiple of 256.
        map_layers: Layers of a feature network: 3 with ``max(D, 2 F)`` hidden values, 2 with ``max(D, F)``.
        split_qk: One feature network for queries and one for keys.
        qk_norm: L2-normalise the features of a token.
        eps: Floor of the denominator and of the feature norm.
        landmark_fraction: Share of the image tokens that are landmarks, 0 to 1.
        landmark_minimum: At least so many image landmarks.
        landmark_maximum: At most so many; 0 = no limit, and the branch is then quadratic in the number of tokens.
        landmark_qk_norm: L2-normalise q and k in the landmark branch.
        blend: ``"convex"``: ``kernel + a (landmark - kernel)`` with ``a`` below ``alpha_max``; ``"additive"``:
            ``kernel + alpha landmark`` with ``alpha`` as it is.
        alpha_init: Initial blend: a share of ``alpha_max``, 0 to 1, or ``alpha`` itself.
        alpha_max: Largest possible blend, 0 to 1; convex only.
        adaptive_alpha: Blend more where the branches disagree more; convex only.
        gamma: How much more.
        conditioned: Sigma and guidance scale and shift the branches.
        sigma_scale: See ``SigmaCfgConditioner``; 1 is what checkpoints of the original student were trained with.
        cfg_scale: Likewise.
        feature_dtype: Features are computed in it when serving; master weights stay float32.
        training_dtype: Dtype of the feature networks' products in training; see ``KernelFeatureMap``.
        workspace_bytes: Feature networks stay below this size.
    """

    feature_dim: int = 256
    map_layers: Literal[2, 3] = 3
    split_qk: bool = True
    qk_norm: bool = True
    eps: float = 1e-6
    landmark_fraction: float = 0.08
    landmark_minimum: int = 64
    landmark_maximum: int = 0
    landmark_qk_norm: bool = False
    blend: Blend = "convex"
    alpha_init: float = 0.1
    alpha_max: float = 0.2
    adaptive_alpha: bool = True
    gamma: float = 2.0
    conditioned: bool = True
    sigma_scale: float = 1.0
    cfg_scale: float = 1.0
    feature_dtype: MapDtype = "float32"
    training_dtype: TrainingDtype = "auto"
    workspace_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        validate_feature_dim(self.feature_dim)
        shares = ("landmark_fraction", "alpha_max", *(("alpha_init",) if self.blend == "convex" else ()))
        for name in shares:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.eps <= 0.0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.landmark_minimum < 1 or self.landmark_maximum < 0:
            raise ValueError(
                "landmark_minimum must be at least 1 and landmark_maximum at least 0, got "
                f"{self.landmark_minimum} and {self.landmark_maximum}"
            )
        for name in ("gamma", "alpha_init", "sigma_scale", "cfg_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        allowed: dict[str, tuple[object, ...]] = {
            "map_layers": (2, 3),
            "blend": ("convex", "additive"),
            "feature_dtype": ("float32", "bfloat16", "float16"),
            "training_dtype": ("auto", "float32", "bfloat16"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.workspace_bytes < 1:
            raise ValueError(f"workspace_bytes must be positive, got {self.workspace_bytes}")


class HkrStudent(StudentAttention):
    """``out = kernel + alpha * (landmark - kernel)`` with a learned, per-token ``alpha``.

    Text and reference tokens are always landmarks. A query that no unmasked landmark serves keeps the kernel branch.

    Args:
        config: Settings.
        heads: Number of heads, H.
        width: Width of a head, D.
        generator: Draws the initial weights.
    """

    def __init__(self, config: HkrConfig, heads: int, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(heads, width)
        self.config = config
        start = logit(config.alpha_init) if config.blend == "convex" else config.alpha_init
        self.alpha = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        self.kernel = KernelFeatureMap(
            width,
            config.feature_dim,
            layers=config.map_layers,
            split_qk=config.split_qk,
            qk_norm=config.qk_norm,
            eps=config.eps,
            query_norm=False,
            dtype=None if config.feature_dtype == "float32" else getattr(torch, config.feature_dtype),
            training_dtype=config.training_dtype,
            workspace_bytes=config.workspace_bytes,
            generator=generator,
        )
        if config.conditioned:
            self.conditioner = SigmaCfgConditioner(
                4, sigma_scale=config.sigma_scale, cfg_scale=config.cfg_scale, generator=generator
            )

    def forward(
        self, call: AttentionCall, *, query_positions: Tensor | None = None, selection: Tensor | None = None
    ) -> Tensor:
        """Answer a call; see ``StudentAttention``. ``query_positions`` and ``selection`` make no difference here.

        With ``adaptive_alpha`` the blend of a token is relative to the mean over the queries of the call.
        """
        del query_positions, selection
        kernel = self.kernel.attend(call.q, call.k, call.v, key_mask=call.key_mask, eps=self.config.eps).out
        landmark, served = self._landmark_branch(call)
        modulation = None
        if self.config.conditioned and call.step is not None and math.isfinite(call.step.sigma):
            modulation = self.conditioner(call.step)
        if self.config.blend == "convex":
            gamma = self.config.gamma if self.config.adaptive_alpha else None
            return convex(kernel, landmark, modulation, served, ConvexBlend(self.alpha, self.config.alpha_max, gamma))
        if modulation is not None:
            kernel, landmark = modulated(kernel, landmark, modulation)
        addend = self.alpha.to(kernel.dtype) * landmark
        return kernel + (addend if served is None else addend.masked_fill(~served, 0.0))

    def flops(self, layout: TokenLayout, batch: int, heads: int, width: int) -> float:
        """Count operations: feature networks, kernel sums and landmark attention."""
        tokens, features = layout.length, self.kernel.features
        networks = self.kernel.flops_per_token()
        kernel = kernel_regression_flops(batch, heads, tokens, tokens, features, width, map_flops=networks)
        landmarks = landmark_index(layout, self.config, torch.device("cpu")).numel()
        return kernel + exact_flops(batch, heads, tokens, landmarks, width, width)

    def _landmark_branch(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        index = landmark_index(required_layout(call), self.config, call.k.device)
        q, k = call.q, call.k
        if self.config.landmark_qk_norm:
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        out, lse = landmark_attention(q, k, call.v, index, scale=call.scale, key_mask=call.key_mask)
        return out, None if call.key_mask is None else (lse > -torch.inf).unsqueeze(-1)


@lru_cache(maxsize=64)
def landmark_index(layout: TokenLayout, config: HkrConfig, device: torch.device) -> Tensor:
    """Return the landmark positions of a layout, ``[M]`` int64: all text and reference tokens, strided image tokens."""
    # Made outside inference mode: the cached tensor may be saved by autograd later.
    with training_mode():
        return landmarks_of(layout, config).to(device)
