"""The operators of the benchmark: how each is run, what it must answer, and what it costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from attn_kernels import (
    HedgehogFeatureMap,
    MlpFeatureMap,
    NearFarConfig,
    Projection,
    TaylorConfig,
    feature_map_attention,
    fit_projection,
    hybrid_attention,
    kernel_regression,
    landmark_attention,
    near_far_attention,
    near_far_keys,
    pooled_landmark_attention,
    select_tiles,
    softmax_attention,
    strided_landmarks,
    taylor_attention,
    window_attention_2d,
)
from attn_kernels.blocked_cost import taylor_blocked_work
from attn_kernels.cost import (
    AttentionShape,
    attend_work,
    hybrid_work,
    kernel_regression_work,
    near_far_work,
    taylor_work,
    window_keys_2d,
)
from attn_kernels.device_model import Work
from attn_kernels.window import window_mask_2d
from scenes import Scene
from torch import Tensor
from torch.nn import functional as F

HIDDEN, FEATURES = 512, 256
"""Of the feature map of the first published students."""


@dataclass(frozen=True)
class Case:
    """One operator on given tensors.

    Attributes:
        name: What it is called in the table.
        run: Computes ``[B, H, N, D]``.
        expected: Computes the specification's answer for the sampled queries, ``[B, H, S, D]``, in float32 at least.
        work: What the cost model is told.
        keys: Mean number of keys that a query meets; NaN where the operator has no such number.
        allowed: Largest relative error against ``expected``; the benchmark's own if ``None``.
    """

    name: str
    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    work: Work
    keys: float = math.nan
    allowed: float | None = None


@dataclass(frozen=True)
class Tensors:
    """Queries, keys and values of a scene, and the positions of the sampled queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor

    @property
    def shape(self) -> AttentionShape:
        """Sizes."""
        return AttentionShape.of(self.q, self.k, self.v)

    @property
    def sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled queries, all keys and values, in float32."""
        return self.q[:, :, self.rows].float(), self.k.float(), self.v.float()


def make_cases(scene: Scene, t: Tensors) -> list[Case]:
    """Build the operators that a scene names.

    Raises:
        KeyError: The scene names an operator that is not here.
    """
    makers: dict[str, Callable[[], Case]] = {
        "near-far t4 k0": lambda: near_far_case(scene, t, NearFarConfig(4, 1, 0)),
        "near-far t4 k8": lambda: near_far_case(scene, t, NearFarConfig(4, 1, 8)),
        "near-far t8 k0": lambda: near_far_case(scene, t, NearFarConfig(8, 1, 0)),
        "near-far t8 k2": lambda: near_far_case(scene, t, NearFarConfig(8, 1, 2)),
        "taylor 3": lambda: taylor_case(t, 3),
        "taylor 4": lambda: taylor_case(t, 4),
        "taylor 5": lambda: taylor_case(t, 5),
        "taylor 3 streamed": lambda: taylor_case(t, 3, path="streaming"),
        "taylor 3 in 8 blocks": lambda: taylor_case(t, 3, blocks=8),
        "taylor 4 in 8 blocks": lambda: taylor_case(t, 4, blocks=8),
        "window 2-D r8": lambda: window_case(scene, t, 8),
        "landmark 5%": lambda: landmark_case(scene, t, 0.05),
        "landmark 8%": lambda: landmark_case(scene, t, 0.08),
        "pooled landmark t4": lambda: pooled_case(scene, t, 4),
        "hybrid r3 P3": lambda: hybrid_case(scene, t, radius=3, terms=3, rank=16),
        "hybrid r3 P3 added": lambda: hybrid_case(scene, t, radius=3, terms=3, rank=16, combine="additive"),
        "mlp map": lambda: mlp_case(t, t.q.dtype),
        "mlp map bf16": lambda: mlp_case(t, torch.bfloat16),
        "hedgehog map": lambda: hedgehog_case(t),
        "kernel regression F64": lambda: regression_case(t, 64),
    }
    return [makers[name]() for name in scene.operators]


def near_far_case(scene: Scene, t: Tensors, config: NearFarConfig) -> Case:
    """Near-far attention; choosing the tiles is part of what is timed."""
    grids = scene.grids

    def expected() -> Tensor:
        q, k, v = t.sampled
        # Chosen in the dtype that is timed: a tile on the edge may go either way, and is no error.
        chosen = select_tiles(t.q, t.k, grids=grids, config=config) if config.top_k else None
        return near_far_attention(
            q, k, v, grids=grids, config=config, selection=chosen, query_positions=t.rows, impl="reference"
        ).out

    return Case(
        f"near-far t{config.tile} k{config.top_k}",
        lambda: near_far_attention(t.q, t.k, t.v, grids=grids, config=config).out,
        expected,
        near_far_work(t.shape, grids=grids, config=config),
        near_far_keys(grids, t.q.shape[2], config),
    )


def taylor_case(t: Tensors, terms: int, *, blocks: int = 1, path: Literal["auto", "streaming"] = "auto") -> Case:
    """Taylor attention; its specification is the truncated series of every pair, in float64."""
    width = t.q.shape[-1] // blocks
    config = TaylorConfig(blocks=blocks, mode="independent" if blocks > 1 else "whole", path=path)
    # Independent blocks are heads of their own; their logits are as small as those of a narrow head must be.
    q = t.q * 0.25 if blocks > 1 else t.q
    name = f"taylor {terms}" + (f" in {blocks} blocks" if blocks > 1 else " streamed" if path == "streaming" else "")
    fused = t.q.device.type == "cuda"
    work = (
        taylor_work(t.shape, terms=terms, blocks=blocks)
        if fused
        else taylor_blocked_work(t.shape, terms=terms, config=config)
    )
    return Case(
        name,
        lambda: taylor_attention(q, t.k, t.v, terms=terms, scale=width**-0.5, config=config).out,
        lambda: pairwise_series(q, t, terms, blocks, width**-0.5),
        work,
    )


def pairwise_series(q: Tensor, t: Tensors, terms: int, blocks: int, scale: float) -> Tensor:
    """Truncated series around mean query and mean key, written out for every pair of a sampled query and a key."""
    outputs = []
    for part in range(blocks):
        query, key, value = (x.double().chunk(blocks, dim=-1)[part] for x in (q, t.k, t.v))
        centre = query.mean(dim=2, keepdim=True)
        weights = (scale * centre @ key.mT).softmax(dim=-1)
        residual = scale * (query[:, :, t.rows] - centre) @ (key - weights @ key).mT
        series = sum((residual**degree / math.factorial(degree) for degree in range(terms)), torch.zeros(()))
        weights = weights * series
        outputs.append(weights @ value / weights.sum(dim=-1, keepdim=True))
    return torch.cat(outputs, dim=-1)


def window_case(scene: Scene, t: Tensors, radius: int) -> Case:
    """Window attention in two dimensions."""

    def expected() -> Tensor:
        q, k, v = t.sampled
        return window_attention_2d(
            q, k, v, grids=scene.grids, radius=radius, query_positions=t.rows, impl="reference"
        ).out

    keys = window_keys_2d(t.q.shape[2], scene.grids, radius)
    return Case(
        f"window 2-D r{radius}",
        lambda: window_attention_2d(t.q, t.k, t.v, grids=scene.grids, radius=radius).out,
        expected,
        attend_work("window", t.shape, keys),
        keys,
    )


def landmark_case(scene: Scene, t: Tensors, fraction: float) -> Case:
    """Strided landmarks and all text."""
    index = strided_landmarks(t.q.shape[2], [(0, scene.text)], fraction=fraction, minimum=64, maximum=0).to(t.q.device)

    def expected() -> Tensor:
        q, k, v = t.sampled
        return softmax_attention(q, k[:, :, index], v[:, :, index]).out

    return Case(
        f"landmark {fraction:.0%}",
        lambda: landmark_attention(t.q, t.k, t.v, index).out,
        expected,
        attend_work("landmark", t.shape, len(index), launches=2),
        len(index),
    )


def pooled_case(scene: Scene, t: Tensors, tile: int) -> Case:
    """One pooled landmark per tile, and all text: near-far attention without any near tile."""
    far = NearFarConfig(tile, 0, 0, "pooled")

    def expected() -> Tensor:
        q, k, v = t.sampled
        keys, values, bias = [k[:, :, : scene.text]], [v[:, :, : scene.text]], [torch.zeros(scene.text)]
        for grid in scene.grids:
            places = (torch.arange(grid.tokens) + grid.start).view(grid.rows, grid.columns)
            for block in (b for band in places.split(tile, 0) for b in band.split(tile, 1)):
                index = block.flatten().to(k.device)
                keys.append(k[:, :, index].mean(2, keepdim=True))
                values.append(v[:, :, index].mean(2, keepdim=True))
                bias.append(torch.tensor([math.log(index.numel())]))
        return softmax_attention(q, torch.cat(keys, 2), torch.cat(values, 2), attn_bias=torch.cat(bias).to(q)).out

    count = scene.text + sum(-(-g.rows // tile) * -(-g.columns // tile) for g in scene.grids)
    return Case(
        f"pooled landmark t{tile}",
        lambda: pooled_landmark_attention(t.q, t.k, t.v, grids=scene.grids, tile=far.tile).out,
        expected,
        attend_work("landmark", t.shape, count, launches=2),
        count,
    )


def hybrid_case(
    scene: Scene,
    t: Tensors,
    *,
    radius: int,
    terms: int,
    rank: int,
    combine: Literal["shared", "additive"] = "shared",
) -> Case:
    """Hybrid attention, with one denominator or as a sum; its projection is fitted before."""
    projection = fit_projection(t.q, t.k, rank=rank)
    keys = window_keys_2d(t.q.shape[2], scene.grids, radius)
    shared = combine == "shared"

    def added() -> Tensor:
        local = window_case(scene, t, radius).expected()
        low_q, low_k = projection.apply(t.q, t.k)
        low = Tensors(low_q, low_k, t.v, t.rows)
        return local.double() + pairwise_series(low_q, low, terms, 1, t.q.shape[-1] ** -0.5)

    return Case(
        f"hybrid r{radius} P{terms}" + ("" if shared else " added"),
        lambda: (
            hybrid_attention(
                t.q, t.k, t.v, projection, grids=scene.grids, radius=radius, terms=terms, combine=combine
            ).out
        ),
        (lambda: pairwise_hybrid(scene, t, projection, radius, terms)) if shared else added,
        hybrid_work(t.shape, near_keys=keys, rank=rank, terms=terms, fused=t.q.device.type == "cuda"),
        keys,
    )


def pairwise_hybrid(scene: Scene, t: Tensors, projection: Projection, radius: int, terms: int) -> Tensor:
    """Exact weights near by and those of the series elsewhere, written out for every pair of a sampled query and a key.

    Of a far logit the parts with the mean query and the mean key are exact; the series sees the rest, projected.
    """
    q, k, v = (x.double() for x in (t.q, t.k, t.v))
    low_q, low_k = (x.double() for x in projection.apply(t.q, t.k))
    scale = q.shape[-1] ** -0.5
    centre = q.mean(dim=2, keepdim=True)
    share = (scale * centre @ k.mT).softmax(dim=-1)
    rows = q[:, :, t.rows]
    known = scale * ((rows - centre) @ (share @ k).mT + centre @ k.mT)
    rest = scale * (low_q[:, :, t.rows] - low_q.mean(dim=2, keepdim=True)) @ (low_k - share @ low_k).mT
    series = sum((rest**degree / math.factorial(degree) for degree in range(terms)), torch.zeros(()))
    exact = scale * rows @ k.mT
    peak = torch.maximum(exact, known).amax(dim=-1, keepdim=True)
    near = window_mask_2d(scene.tokens, grids=scene.grids, radius=radius, query_positions=t.rows).to(q.device)
    weights = torch.where(near, (exact - peak).exp(), (known - peak).exp() * series)
    return weights @ v / weights.sum(dim=-1, keepdim=True)


def mlp_case(t: Tensors, dtype: torch.dtype) -> Case:
    """Kernel regression behind the three-layer feature map, in the dtype of its matrices."""
    generator = torch.Generator().manual_seed(1)
    widths = (t.q.shape[-1], HIDDEN, HIDDEN, FEATURES)
    layers = []
    for inner, outer in pairwise(widths):
        layers += [torch.randn(outer, inner, generator=generator) / inner**0.5, torch.zeros(outer)]
    exact = MlpFeatureMap(*layers).to(t.q.device)
    cast = exact.to(dtype)

    def expected() -> Tensor:
        q, k, v = t.sampled
        return feature_map_attention(q, k, v, exact, impl="reference").out

    work = kernel_regression_work(t.shape, features=FEATURES, layers=(HIDDEN, HIDDEN))
    half = dtype is not torch.float32
    return Case(
        "mlp map" if dtype is t.q.dtype else "mlp map bf16",
        lambda: feature_map_attention(t.q, t.k, t.v, cast, map_dtype=dtype).out,
        expected,
        work._replace(operator="kernel_regression:bf16") if half else work,
        allowed=2e-2 if half else None,
    )


def hedgehog_case(t: Tensors) -> Case:
    """Kernel regression behind softmax features of one layer per head."""
    heads, width = t.q.shape[1], t.q.shape[-1]
    weight = torch.randn(heads, width, width, generator=torch.Generator().manual_seed(2)) / width**0.5
    feature_map = HedgehogFeatureMap(weight).to(t.q.device)

    def expected() -> Tensor:
        q, k, v = t.sampled
        return feature_map_attention(q, k, v, feature_map, impl="reference").out

    work = kernel_regression_work(t.shape, features=2 * width, layers=(width,))
    return Case(
        "hedgehog map",
        lambda: feature_map_attention(t.q, t.k, t.v, feature_map).out,
        expected,
        work._replace(operator="kernel_regression:hedgehog"),
    )


def regression_case(t: Tensors, features: int) -> Case:
    """Kernel regression on features that are there already."""
    maps = torch.randn(2, t.q.shape[-1], features, generator=torch.Generator().manual_seed(1))
    phi_q, phi_k = (
        F.elu(x @ weights.to(x) / x.shape[-1] ** 0.5) + 1 for x, weights in zip((t.q, t.k), maps, strict=True)
    )

    def expected() -> Tensor:
        weights = phi_q[:, :, t.rows].double() @ phi_k.double().mT
        return (weights / weights.sum(-1, keepdim=True)) @ t.v.double()

    return Case(
        f"kernel regression F{features}",
        lambda: kernel_regression(phi_q, phi_k, t.v).out,
        expected,
        kernel_regression_work(t.shape, features=features)._replace(operator="kernel_regression:given"),
    )
