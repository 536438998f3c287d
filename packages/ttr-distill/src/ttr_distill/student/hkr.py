"""The ``hkr`` student: kernel regression with learned features, blended with exact attention over landmarks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from attn_dispatch import AttentionCall, StepContext, TokenLayout
from attn_kernels import kernel_regression, landmark_attention, strided_landmarks
from torch import Tensor, nn
from torch.nn import functional

from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention, logit, modulate, required_layout
from ttr_distill.student.conditioner import SigmaCfgConditioner
from ttr_distill.student.feature_map import KernelFeatureMap, validate_feature_dim

FeatureDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class HkrConfig:
    """Settings of the ``hkr`` student.

    Attributes:
        feature_dim: Number of features F, a multiple of 256.
        split_qk: One feature network for queries and one for keys.
        qk_norm: L2-normalise the features of a token.
        eps: Floor of the denominator and of the feature norm.
        landmark_fraction: Share of the image tokens that are landmarks, 0 to 1.
        landmark_minimum: At least so many image landmarks.
        landmark_maximum: At most so many; 0 = no limit, and the branch is then quadratic in the number of tokens.
        landmark_qk_norm: L2-normalise q and k in the landmark branch.
        alpha_init: Initial blend towards the landmarks as a share of ``alpha_max``, 0 to 1.
        alpha_max: Largest possible blend, 0 to 1.
        adaptive_alpha: Blend more where the branches disagree more.
        gamma: How much more.
        feature_dtype: Features are computed in it; master weights stay float32.
        workspace_bytes: Heads are taken in groups whose feature networks stay below this size.
    """

    feature_dim: int = 256
    split_qk: bool = True
    qk_norm: bool = True
    eps: float = 1e-6
    landmark_fraction: float = 0.08
    landmark_minimum: int = 64
    landmark_maximum: int = 0
    landmark_qk_norm: bool = False
    alpha_init: float = 0.1
    alpha_max: float = 0.2
    adaptive_alpha: bool = True
    gamma: float = 2.0
    feature_dtype: FeatureDtype = "float32"
    workspace_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        validate_feature_dim(self.feature_dim)
        for name in ("landmark_fraction", "alpha_init", "alpha_max"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.eps <= 0.0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.landmark_minimum < 1 or self.landmark_maximum < 0:
            raise ValueError(
                "landmark_minimum must be at least 1 and landmark_maximum at least 0, got "
                f"{self.landmark_minimum} and {self.landmark_maximum}"
            )
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be finite, got {self.gamma}")
        if self.feature_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"feature_dtype must be float32, bfloat16 or float16, got {self.feature_dtype!r}")
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
        self.alpha = nn.Parameter(torch.tensor(logit(config.alpha_init), dtype=torch.float32))
        self.kernel = KernelFeatureMap(
            width,
            config.feature_dim,
            split_qk=config.split_qk,
            qk_norm=config.qk_norm,
            eps=config.eps,
            dtype=None if config.feature_dtype == "float32" else getattr(torch, config.feature_dtype),
            generator=generator,
        )
        self.conditioner = SigmaCfgConditioner(generator=generator)

    def forward(
        self, call: AttentionCall, *, query_positions: Tensor | None = None, selection: Tensor | None = None
    ) -> Tensor:
        """Answer a call; see ``StudentAttention``. ``query_positions`` and ``selection`` make no difference here.

        With ``adaptive_alpha`` the blend of a token is relative to the mean over the queries of the call.
        """
        del query_positions, selection
        kernel = self._kernel_branch(call)
        landmark, served = self._landmark_branch(call)
        if call.step is not None and math.isfinite(call.step.sigma):
            kernel, landmark = self._conditioned(kernel, landmark, call.step)
        blend = self._blend(kernel, landmark).to(kernel.dtype)
        # Where no landmark is left the branch is empty, not zero: blend nothing into it.
        return kernel + torch.where(served, blend, torch.zeros_like(blend)) * (landmark - kernel)

    def flops(self, layout: TokenLayout, batch: int, heads: int, width: int) -> float:
        """Count operations: feature networks, kernel sums and landmark attention."""
        hidden, features = self.kernel.hidden, self.kernel.feature_dim
        networks = 2 * (width * hidden + hidden * hidden + hidden * features)
        landmarks = landmark_index(layout, self.config, torch.device("cpu")).numel()
        per_token = networks + 2 * features * width + 2 * landmarks * width
        return 2.0 * batch * heads * layout.length * per_token

    def _kernel_branch(self, call: AttentionCall) -> Tensor:
        parts = []
        for part in self._head_groups(call):
            q, k, v = call.q[:, part], call.k[:, part], call.v[:, part]
            phi_q, phi_k = self.kernel.query(q), self.kernel.key(k)
            parts.append(kernel_regression(phi_q, phi_k, v, key_mask=call.key_mask, eps=self.config.eps).out)
        return torch.cat(parts, dim=1)

    def _head_groups(self, call: AttentionCall) -> Iterator[slice]:
        # Per token: two hidden activations alive at once, and the features of both sides.
        wide = 4 * call.q.shape[0] * call.k.shape[2] * 2 * (self.kernel.hidden + self.kernel.feature_dim)
        group = max(1, self.config.workspace_bytes // max(1, wide))
        for first in range(0, self.heads, group):
            yield slice(first, min(self.heads, first + group))

    def _landmark_branch(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        index = landmark_index(required_layout(call), self.config, call.k.device)
        q, k = call.q, call.k
        if self.config.landmark_qk_norm:
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        out, lse = landmark_attention(q, k, call.v, index, scale=call.scale, key_mask=call.key_mask)
        return out, (lse > -torch.inf).unsqueeze(-1)

    def _conditioned(self, kernel: Tensor, landmark: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        by = self.conditioner(step)
        kernel = modulate(kernel, by.scale_kernel, by.bias_kernel)
        return kernel, modulate(landmark, by.scale_landmark, by.bias_landmark)

    def _blend(self, kernel: Tensor, landmark: Tensor) -> Tensor:
        """Weight of the landmark branch, ``[B, H, Nq, 1]`` (or 0-d without adaptation)."""
        if not self.config.adaptive_alpha:
            return self.config.alpha_max * torch.sigmoid(self.alpha)
        with torch.no_grad():
            wide = torch.promote_types(kernel.dtype, torch.float32)
            distance = 1.0 - functional.cosine_similarity(kernel.to(wide), landmark.to(wide), dim=-1)
            mean = distance.mean().clamp_min(1e-6)
            disagreement = (distance / mean).clamp_max(3.0) / 3.0
        blend = torch.sigmoid(self.alpha + self.config.gamma * (disagreement - 0.5))
        return self.config.alpha_max * blend.unsqueeze(-1)


@lru_cache(maxsize=64)
def landmark_index(layout: TokenLayout, config: HkrConfig, device: torch.device) -> Tensor:
    """Return the landmark positions of a layout, ``[M]`` int64: all text and reference tokens, strided image tokens."""
    exact = [*layout.text, *((grid.start, grid.stop) for grid in layout.references)]
    # Made outside inference mode: the cached tensor may be saved by autograd later.
    with training_mode():
        index = strided_landmarks(
            layout.length,
            exact,
            fraction=config.landmark_fraction,
            minimum=config.landmark_minimum,
            maximum=config.landmark_maximum,
        )
        return index.to(device)
