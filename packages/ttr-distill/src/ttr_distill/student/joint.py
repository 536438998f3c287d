"""Students with one denominator: some keys exactly, all others through a learned feature map."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from attn_dispatch import AttentionCall, TokenLayout
from attn_kernels import Partial, landmark_attention, merge_partials, window_attention_2d
from attn_kernels.cost import exact_flops, kernel_regression_flops, window_keys_2d
from torch import Tensor, nn

from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention, landmarks_of, required_layout
from ttr_distill.student.conditioner import SigmaCfgConditioner
from ttr_distill.student.feature_map import MapDtype, TrainingDtype
from ttr_distill.student.feature_map_catalog import FeatureMaps, MapRequest


@dataclass(frozen=True)
class JointConfig:
    """Settings of a student with one denominator.

    Attributes:
        feature_map: Name of the feature map of the far field, in the ``FeatureMaps`` that the student is made with.
        feature_dim: Number of features F; ``"mlp"`` wants a multiple of 256.
        feature_hidden: Width of the map's hidden layer, where it has one to choose (``"exp"``); 0 = none.
        qk_norm: L2-normalise the features of a token (``"mlp"``).
        eps: Floor of the far field's denominator and of the feature norm.
        radius: Image queries see the tokens of their grid within this Chebyshev distance exactly; ``None`` = no window.
        exact_queries: What queries outside the grids see where there is a window: ``"exact"`` every key,
            ``"local"`` the tokens outside the grids exactly and the far field.
        landmark_fraction: Share of the image tokens that every query sees exactly, 0 to 1.
        landmark_minimum: At least so many of them.
        landmark_maximum: At most so many; 0 = no limit, and the student is then quadratic in the number of tokens
            unless the fraction is 0.
        conditioned: Sigma and guidance move the far field: its weight, and the length of its queries, per head.
        sigma_scale: See ``SigmaCfgConditioner``.
        cfg_scale: Likewise.
        map_dtype: Dtype of the map's products when serving (``"mlp"``); master weights stay float32.
        training_dtype: Dtype of the map's products in training (``"mlp"``).
        workspace_bytes: The map's networks stay below this size (``"mlp"``).
    """

    feature_map: str = "exp"
    feature_dim: int = 64
    feature_hidden: int = 0
    qk_norm: bool = False
    eps: float = 1e-6
    radius: int | None = 5
    exact_queries: Literal["exact", "local"] = "exact"
    landmark_fraction: float = 0.0
    landmark_minimum: int = 0
    landmark_maximum: int = 0
    conditioned: bool = True
    sigma_scale: float = 1000.0
    cfg_scale: float = 10.0
    map_dtype: MapDtype = "float32"
    training_dtype: TrainingDtype = "auto"
    workspace_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        if self.radius is not None and self.radius < 0:
            raise ValueError(f"radius must be None or at least 0, got {self.radius}")
        if not 0.0 <= self.landmark_fraction <= 1.0 or self.landmark_minimum < 0 or self.landmark_maximum < 0:
            raise ValueError(
                "need landmark_fraction in [0, 1], landmark_minimum and landmark_maximum at least 0, got "
                f"{self.landmark_fraction}, {self.landmark_minimum} and {self.landmark_maximum}"
            )
        if self.feature_dim < 1 or self.feature_hidden < 0 or self.workspace_bytes < 1 or not self.eps > 0.0:
            raise ValueError(
                f"feature_dim, workspace_bytes and eps must be positive, feature_hidden not negative: {self}"
            )
        if self.exact_queries not in ("exact", "local"):
            raise ValueError(f"exact_queries must be 'exact' or 'local', got {self.exact_queries!r}")
        if not math.isfinite(self.sigma_scale) or not math.isfinite(self.cfg_scale):
            raise ValueError(f"sigma_scale and cfg_scale must be finite, got {self.sigma_scale}, {self.cfg_scale}")


class KeyRoles(NamedTuple):
    """Who sees which key how, by layout.

    Attributes:
        landmarks: ``[M]`` int64, keys that every query sees exactly beside its window; ``None`` = none.
        window: ``[N]`` bool, keys that a window may hold; ``None`` = all.
        first: First key of the far field.
        stop: Key after its last one.
        far: ``[stop - first]`` bool, which keys between them the far field holds; ``None`` = all.
        near_only: ``[N]`` bool, queries that have no far field since they see every key exactly; ``None`` = none.
    """

    landmarks: Tensor | None
    window: Tensor | None
    first: int
    stop: int
    far: Tensor | None
    near_only: Tensor | None


class JointStudent(StudentAttention):
    """Text, references, a window and landmarks exactly, the other keys by kernel regression; one softmax over all.

    The weight of an exact key is ``exp(s_j)``, that of a far one ``w phi(q) . phi(k_j)`` with a learned w per head, and
    ``out`` is the mean of the values by these weights. The far field also holds the keys of the query's window: it
    learns what to leave to the window, since leaving those keys out would cost as much as the window itself.

    Args:
        config: Settings.
        heads: Number of heads, H.
        width: Width of a head, D.
        generator: Draws the initial weights.
        feature_maps: Where ``config.feature_map`` is looked up.
    """

    def __init__(
        self,
        config: JointConfig,
        heads: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        feature_maps: FeatureMaps | None = None,
    ) -> None:
        super().__init__(heads, width)
        self.config = config
        request = MapRequest(
            heads=heads,
            width=width,
            feature_dim=config.feature_dim,
            hidden=config.feature_hidden,
            qk_norm=config.qk_norm,
            eps=config.eps,
            map_dtype=config.map_dtype,
            training_dtype=config.training_dtype,
            workspace_bytes=config.workspace_bytes,
            generator=generator,
        )
        self.kernel = (feature_maps or FeatureMaps()).make(config.feature_map, request)
        # A feature map starts near phi(q) . phi(k) = F: each far key then weighs as much as one of score 0.
        start = 0.0 if config.qk_norm else -math.log(self.kernel.features)
        self.far_weight = nn.Parameter(torch.full((heads,), start, dtype=torch.float32))
        if config.conditioned:
            self.conditioner = SigmaCfgConditioner(
                2 * heads, sigma_scale=config.sigma_scale, cfg_scale=config.cfg_scale, generator=generator
            )

    def forward(
        self, call: AttentionCall, *, query_positions: Tensor | None = None, selection: Tensor | None = None
    ) -> Tensor:
        """Answer a call; see ``StudentAttention``. ``selection`` makes no difference here."""
        del selection
        roles = key_roles(required_layout(call), self.config, call.k.device)
        parts = self._near(call, roles, query_positions)
        if roles.near_only is None:
            return merge_partials(*parts, self._far(call, call.q, roles)).out
        if query_positions is None and roles.far is None:
            # One block of image tokens: only its queries are mapped to features.
            rows = slice(roles.first, roles.stop)
            near = merge_partials(*parts)
            block = Partial(near.out[:, :, rows], near.lse[:, :, rows])
            joined = merge_partials(block, self._far(call, call.q[:, :, rows], roles)).out
            return torch.cat([near.out[:, :, : roles.first], joined, near.out[:, :, roles.stop :]], dim=2)
        far = self._far(call, call.q, roles)
        only = roles.near_only if query_positions is None else roles.near_only.index_select(0, query_positions)
        return merge_partials(*parts, Partial(far.out, far.lse.masked_fill(only, -torch.inf))).out

    def flops(self, layout: TokenLayout, batch: int, heads: int, width: int) -> float:
        """Count operations: the feature map on both sides, the far field's sums, and the exact keys."""
        roles = key_roles(layout, self.config, torch.device("cpu"))
        exact = 0.0 if roles.landmarks is None else float(roles.landmarks.numel())
        if self.config.radius is not None:
            exact += window_keys_2d(layout.length, layout.grids, self.config.radius)
        queries = layout.length if roles.near_only is None else layout.image_tokens
        features = self.kernel.features
        far = kernel_regression_flops(
            batch, heads, queries, roles.stop - roles.first, features, width, map_flops=self.kernel.flops_per_token()
        )
        return far + exact_flops(batch, heads, layout.length, min(exact, float(layout.length)), width, width)

    def _near(self, call: AttentionCall, roles: KeyRoles, query_positions: Tensor | None) -> list[Partial]:
        parts = []
        if self.config.radius is not None:
            parts.append(
                window_attention_2d(
                    call.q,
                    call.k,
                    call.v,
                    grids=required_layout(call).grids,
                    radius=self.config.radius,
                    exact_queries=self.config.exact_queries,
                    scale=call.scale,
                    key_mask=_both(call.key_mask, roles.window, call.k.shape[0]),
                    query_positions=query_positions,
                )
            )
        if roles.landmarks is not None:
            parts.append(
                landmark_attention(call.q, call.k, call.v, roles.landmarks, scale=call.scale, key_mask=call.key_mask)
            )
        return parts

    def _far(self, call: AttentionCall, q: Tensor, roles: KeyRoles) -> Partial:
        keys = slice(roles.first, roles.stop)
        given = None if call.key_mask is None else call.key_mask[:, keys]
        weight = self.far_weight
        if self.config.conditioned and call.step is not None and math.isfinite(call.step.sigma):
            shift, gain = self.conditioner(call.step).view(2, self.heads)
            weight = weight + shift
            q = q * (1.0 + gain.to(q.dtype)).view(-1, 1, 1)
        mask = _both(given, roles.far, q.shape[0])
        far = self.kernel.attend(q, call.k[:, :, keys], call.v[:, :, keys], key_mask=mask, eps=self.config.eps)
        return Partial(far.out, far.lse + weight.to(far.lse.dtype).view(-1, 1))


def _both(mask: Tensor | None, kept: Tensor | None, batch: int) -> Tensor | None:
    """Join a mask ``[B, n]`` and one for all rows ``[n]``, each possibly ``None`` = all."""
    if kept is None:
        return mask
    return kept.expand(batch, -1) if mask is None else mask & kept


@lru_cache(maxsize=64)
def key_roles(layout: TokenLayout, config: JointConfig, device: torch.device) -> KeyRoles:
    """Sort the keys of a layout into landmarks, window and far field."""
    # Made outside inference mode: the cached tensors may be saved by autograd later.
    with training_mode():
        image = torch.zeros(layout.length, dtype=torch.bool)
        for grid in layout.grids:
            image[grid.start : grid.stop] = True
        outside = torch.nonzero(~image).squeeze(1)
        chosen = _image_landmarks(layout, config, image)
        far = image.clone()
        far[chosen] = False
        first, stop = min(grid.start for grid in layout.grids), max(grid.stop for grid in layout.grids)
        landmarks, window = chosen, None
        if config.radius is None:
            landmarks = torch.cat([outside, chosen]).sort().values
        elif chosen.numel():
            window = torch.ones(layout.length, dtype=torch.bool)
            window[chosen] = False
        exact_rows = config.radius is not None and config.exact_queries == "exact" and outside.numel() > 0
        between = far[first:stop]
        return KeyRoles(
            landmarks.to(device) if landmarks.numel() else None,
            None if window is None else window.to(device),
            first,
            stop,
            None if bool(between.all()) else between.to(device),
            (~image).to(device) if exact_rows else None,
        )


def _image_landmarks(layout: TokenLayout, config: JointConfig, image: Tensor) -> Tensor:
    """Choose image tokens evenly, ``[M]`` int64."""
    if config.landmark_fraction == 0.0 and config.landmark_minimum == 0:
        return torch.zeros(0, dtype=torch.int64)
    index = landmarks_of(layout, config)
    return index[image[index]]
