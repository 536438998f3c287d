"""What the operators cost, and from which number of tokens they are faster than exact attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from attn_kernels.device_model import DeviceModel, Work, device_model
from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import NearFarConfig, near_far_keys, tile_total
from attn_kernels.taylor.features import taylor_feature_count


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention.

    Attributes:
        batch: B.
        heads: H.
        queries: Nq.
        keys: Nk.
        width: D.
        value_width: Dv.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Self:
        """Read the sizes of q ``[B, H, Nq, D]``, k ``[B, H, Nk, D]`` and v ``[B, H, Nk, Dv]``."""
        return cls(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])

    @property
    def values(self) -> float:
        """Numbers in q, k, v and the output."""
        return float(self.batch * self.heads * (self.queries + self.keys) * (self.width + self.value_width))


@dataclass(frozen=True)
class Estimate:
    """Predicted times of an operator and of exact attention; true where the operator is faster.

    Attributes:
        operator: Name of the operator.
        seconds: Time of the operator.
        exact_seconds: Time of exact attention.
        source: Where the rates come from; says so if they are not measured.
    """

    operator: str
    seconds: float
    exact_seconds: float
    source: str

    def __bool__(self) -> bool:
        return self.seconds < self.exact_seconds

    @property
    def speed_up(self) -> float:
        """How many times faster than exact attention."""
        return self.exact_seconds / self.seconds


def exact_flops(batch: int, heads: int, queries: int, keys: float, width: int, value_width: int) -> float:
    """Operations of softmax attention: scores and weighted values, ``2 B H Nq Nk (D + Dv)``.

    Args:
        batch: B.
        heads: H.
        queries: Nq.
        keys: Nk; the mean number per query where it differs between queries.
        width: D.
        value_width: Dv.
    """
    return 2.0 * batch * heads * queries * keys * (width + value_width)


def near_far_flops(
    batch: int,
    heads: int,
    length: int,
    width: int,
    value_width: int,
    *,
    grids: Sequence[TokenGrid],
    config: NearFarConfig,
) -> float:
    """Operations of near-far self-attention over ``length`` tokens: exact attention to the mean number of keys.

    Args:
        batch: B.
        heads: H.
        length: Tokens, text and images.
        width: D.
        value_width: Dv.
        grids: Grids of image tokens.
        config: Settings of the operator.
    """
    return exact_flops(batch, heads, length, near_far_keys(grids, length, config), width, value_width)


def kernel_regression_flops(
    batch: int, heads: int, queries: int, keys: int, features: int, value_width: int, *, map_flops: float = 0.0
) -> float:
    """Operations of kernel regression: the state over the keys and its read-out by the queries.

    Args:
        batch: B.
        heads: H.
        queries: Nq.
        keys: Nk.
        features: F.
        value_width: Dv.
        map_flops: Operations of the feature map for one token and head.
    """
    tokens = queries + keys
    return batch * heads * tokens * (2.0 * features * (value_width + 1) + map_flops)


def taylor_flops(
    batch: int, heads: int, queries: int, keys: int, width: int, value_width: int, *, terms: int, blocks: int = 1
) -> float:
    """Operations of Taylor attention: kernel regression on its monomials, in each sub-head block.

    Args:
        batch: B.
        heads: H.
        queries: Nq.
        keys: Nk.
        width: D.
        value_width: Dv.
        terms: P.
        blocks: Blocks into which a head is cut.
    """
    features = taylor_feature_count(width // blocks, terms)
    return kernel_regression_flops(batch, heads * blocks, queries, keys, features, value_width // blocks)


def window_keys(length: int, window: int, prefix: int = 0) -> float:
    """Mean number of keys per query of ``window_attention`` with chunks of one token.

    Args:
        length: Tokens.
        window: Distance up to which a query sees keys.
        prefix: Tokens at the start that every query sees.
    """
    prefix = min(prefix, length)
    # Pairs of a query and a key behind the prefix: for each such key the queries within reach.
    last = _capped_sum(prefix, length, window, length - 1)
    first = _capped_sum(0, length - prefix, window, length - 1)  # counted from the other end
    pairs = last + first - (length - prefix) * (length - 1) + (length - prefix)
    return prefix + pairs / length


def _capped_sum(start: int, stop: int, offset: int, cap: int) -> int:
    """Sum of ``min(j + offset, cap)`` over the integers from ``start`` to ``stop`` - 1."""
    turn = min(max(cap - offset, start), stop)
    return (start + turn - 1) * (turn - start) // 2 + offset * (turn - start) + cap * (stop - turn)


def window_keys_2d(length: int, grids: Sequence[TokenGrid], radius: int | tuple[int, int]) -> float:
    """Mean number of keys per query of ``window_attention_2d`` with exact queries outside the grids.

    Args:
        length: Tokens, text and images.
        grids: Grids of image tokens.
        radius: Chebyshev distance in tokens, or one per axis.
    """
    reach = (radius, radius) if isinstance(radius, int) else radius
    inside = sum(grid.tokens for grid in grids)
    outside = length - inside
    pairs = float(outside * length + inside * outside)
    for grid in grids:
        rows = window_keys(grid.rows, min(reach[0], grid.rows - 1))
        columns = window_keys(grid.columns, min(reach[1], grid.columns - 1))
        pairs += grid.tokens * rows * columns
    return pairs / length


def exact_work(shape: AttentionShape) -> Work:
    """Work of exact attention."""
    return attend_work("exact", shape, shape.keys, launches=1)


def attend_work(operator: str, shape: AttentionShape, keys: float, *, launches: int = 1) -> Work:
    """Work of exact attention to some keys per query: windows and landmarks.

    Args:
        operator: Name under which a model stores its efficiency: ``"window"``, ``"landmark"``.
        shape: Sizes.
        keys: Mean number of keys per query.
        launches: Kernels or passes one after the other.
    """
    flops = exact_flops(shape.batch, shape.heads, shape.queries, keys, shape.width, shape.value_width)
    return Work(operator, flops, shape.batch * shape.heads * shape.queries * keys, 0.0, shape.values, launches)


def near_far_work(shape: AttentionShape, *, grids: Sequence[TokenGrid], config: NearFarConfig) -> Work:
    """Work of near-far self-attention: its keys, the means of its tiles, and the choice of tiles.

    Args:
        shape: Sizes.
        grids: Grids of image tokens.
        config: Settings of the operator.
    """
    base = attend_work(_tiled(config), shape, near_far_keys(grids, shape.keys, config), launches=4)
    gathered = shape.batch * shape.heads * _gathered(grids, config) * (shape.width + shape.value_width)
    # Four times: into tiles, two answers, their merge.
    base = base._replace(copied=gathered + 4.0 * shape.values)
    values = base.values + shape.batch * shape.heads * shape.keys * (shape.width + shape.value_width)
    if config.top_k == 0:
        return base._replace(values=values)
    scores = float(shape.batch * shape.heads * tile_total(grids, config.tile_shape) ** 2)
    return base._replace(values=values, flops=base.flops + 2.0 * scores * shape.width, products=scores, launches=6)


def _gathered(grids: Sequence[TokenGrid], config: NearFarConfig) -> float:
    """Keys that the torch form of near-far attention gathers for one head: near and chosen tiles of each query tile.

    Tiles at an edge gather as many as the others; what does not exist is masked.
    """
    height, width = config.tile_shape
    side = 2 * config.radius + 1
    near = max(min(side, -(-grid.rows // height)) * min(side, -(-grid.columns // width)) for grid in grids)
    return float(tile_total(grids, config.tile_shape) * (near + config.top_k) * height * width)


def _tiled(config: NearFarConfig) -> str:
    """``near_far:8`` for square tiles of 8; the speed depends on the side more than on anything else."""
    rows, columns = config.tile_shape[-2:]
    return f"near_far:{rows}" if rows == columns else "near_far"


def kernel_regression_work(shape: AttentionShape, *, features: int, layers: Sequence[int] = ()) -> Work:
    """Work of kernel regression, and of the feature map in front of it.

    Args:
        shape: Sizes.
        features: F.
        layers: Widths of the map's layers between D and F, in order; none and no map if empty.
    """
    widths = (shape.width, *layers, features) if layers else ()
    map_flops = sum(2.0 * left * right for left, right in pairwise(widths))
    tokens = float(shape.batch * shape.heads * (shape.queries + shape.keys))
    flops = kernel_regression_flops(
        shape.batch, shape.heads, shape.queries, shape.keys, features, shape.value_width, map_flops=map_flops
    )
    values = shape.values if layers else shape.values + tokens * (features - shape.width)
    return Work("kernel_regression", flops, tokens * sum(widths[1:]), 0.0, values, 3 + len(layers))


def taylor_work(shape: AttentionShape, *, terms: int, blocks: int = 1) -> Work:
    """Work of Taylor attention; its features are built anew for queries and keys.

    Args:
        shape: Sizes.
        terms: P.
        blocks: Blocks into which a head is cut.
    """
    sizes = (shape.batch, shape.heads, shape.queries, shape.keys, shape.width, shape.value_width)
    flops = taylor_flops(*sizes, terms=terms, blocks=blocks)
    tokens = float(shape.batch * shape.heads * blocks * (shape.queries + shape.keys))
    products = tokens * taylor_feature_count(shape.width // blocks, terms)
    # Centring reads queries and keys once more.
    values = shape.values + tokens * (shape.width // blocks)
    return Work(f"taylor:{terms}", flops, 0.0, products, values, 4)


def hybrid_work(shape: AttentionShape, *, near_keys: float, rank: int, terms: int, fused: bool = False) -> Work:
    """Work of hybrid attention: exact near keys with their low-rank scores, and Taylor attention of low rank.

    The kernels pass queries and keys once more, for their means, and between them the sums of the series that each
    query reads lie in memory, in float32.

    Args:
        shape: Sizes.
        near_keys: Mean number of near keys per query: ``window_keys`` or ``window_keys_2d``.
        rank: Width to which queries and keys are projected.
        terms: P.
        fused: Whether the kernels run.
    """
    near = attend_work("hybrid", shape, near_keys)
    low = AttentionShape(shape.batch, shape.heads, shape.queries, shape.keys, rank, shape.value_width)
    far = taylor_work(low, terms=terms)
    pairs = near.exponentials
    project = 2.0 * shape.batch * shape.heads * (shape.queries + shape.keys) * shape.width * rank
    flops = near.flops + far.flops + 2.0 * pairs * rank + project
    values, launches = near.values + far.values, 8
    if fused:
        heads = float(shape.batch * shape.heads)
        again = heads * (shape.queries + shape.keys) * shape.width
        # Written and read, each number as large as two of half precision; the far part's own output is not written.
        values += again + heads * shape.queries * shape.value_width * (2 * 2 - 1)
        launches = 16
    return Work("hybrid", flops, pairs, pairs * terms + far.products, values, launches)


def pays_off(
    work: Work,
    shape: AttentionShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str | DeviceModel,
) -> Estimate:
    """Predict whether an operator is faster than exact attention.

    Args:
        work: What the operator does, of one of the ``_work`` functions.
        shape: Sizes of the attention.
        dtype: Dtype of the tensors.
        device: Where they are, or the model of that device; ``device_model`` has the stored ones.

    Raises:
        ValueError: The model has no rate for the dtype.
    """
    model = device if isinstance(device, DeviceModel) else device_model(device)
    exact = model.seconds(exact_work(shape), dtype)
    return Estimate(work.operator, model.seconds(work, dtype), exact, model.source)


def break_even_tokens(
    at: Callable[[int], tuple[AttentionShape, Work]],
    *,
    dtype: torch.dtype,
    device: torch.device | str | DeviceModel,
    least: int = 64,
    most: int = 1 << 20,
) -> int | None:
    """Find the number of tokens below which an operator is slower than exact attention.

    Args:
        at: Sizes and the operator's work for a number of tokens.
        dtype: Dtype of the tensors.
        device: Where they are, or the model of that device; ``device_model`` has the stored ones.
        least: Fewest tokens looked at, and the answer where the operator is faster throughout.
        most: Most tokens looked at.

    Returns:
        The smallest number from which the operator stays faster up to ``most``; ``None`` if it is slower there.

    Raises:
        ValueError: The model has no rate for the dtype, or the range is empty.
    """
    if not 1 <= least < most:
        raise ValueError(f"need 1 <= least < most, got {least} and {most}")
    model = device if isinstance(device, DeviceModel) else device_model(device)

    def faster(tokens: int) -> bool:
        shape, work = at(tokens)
        estimate = pays_off(work, shape, dtype=dtype, device=model)
        return estimate.seconds < estimate.exact_seconds

    if not faster(most):
        return None
    high = most
    # Down in steps of an eighth, so that a second crossing at fewer tokens does not hide the first.
    while high > least:
        low = max(least, high - max(1, high // 8))
        if not faster(low):
            break
        high = low
    else:
        return least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high
