"""Floating-point operations of the operators, a multiply-add counted as two."""

from collections.abc import Sequence

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import NearFarConfig, near_far_keys


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
