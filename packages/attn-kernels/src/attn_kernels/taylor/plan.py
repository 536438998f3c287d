"""How the blocked form goes about a call: which path, and how much at a time."""

from dataclasses import dataclass
from itertools import pairwise

from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.features import monomial_count, taylor_feature_count

_CPU_BUFFER_BYTES = 5 << 18
"""Bytes of monomials made at a time on a CPU: about what its second-level cache holds."""
_DEVICE_BUFFER_BYTES = 1 << 28
"""The same on an accelerator, which needs much work at a time."""
_STATE_BYTES = 1 << 26
"""Bytes of summed features and of monomials of one head up to which the full path is chosen."""
_FEATURES_AT_ONCE = 1 << 14
"""Features whose sums the streaming path holds by default."""
_COLUMNS_AT_ONCE = 256
"""Columns of the streaming path's products: enough to hide that monomials are remade for every group."""
_DIRECT_TERMS = 3
"""Terms up to which the full path makes every feature; above, the last factor is applied to the values instead."""
_FULL_GROUP = 4
"""Coordinates by which the full path multiplies in one product; more mean larger products and more duplicates."""
_TOKENS = (64, 512)
"""Fewest and most tokens of a chunk; further room goes to more heads at a time."""


@dataclass(frozen=True)
class Plan:
    """Sizes of everything the blocked form holds; R features, made as monomials times one more coordinate or none.

    Attributes:
        streaming: Whether the sums are held a chunk at a time.
        variables: Coordinates of a token and the constant, D + 1.
        degree: Degree of the monomials.
        heads: G, heads handled together.
        tokens: n, tokens of a chunk.
        group: Coordinates multiplied in one product; 0 = none, the monomials are the features.
        rows: Monomials handled together.
        columns: Value columns handled together.
    """

    streaming: bool
    variables: int
    degree: int
    heads: int
    tokens: int
    group: int
    rows: int
    columns: int

    def groups(self) -> list[tuple[int, int, int]]:
        """First and last coordinate (exclusive) of each product, and how many monomials it needs."""
        if self.group == 0:
            return [(0, 1, monomial_count(self.variables, self.degree))]
        edges = [*range(1, self.variables, self.group), self.variables]
        return [(a, b, monomial_count(b, self.degree)) for a, b in pairwise(edges)]


def make_plan(
    *,
    heads: int,
    tokens: int,
    width: int,
    value_width: int,
    terms: int,
    itemsize: int,
    device: str,
    config: TaylorConfig,
) -> Plan:
    """Choose the path and its sizes.

    Both paths do the same products, but streaming passes all keys and queries once per chunk of features and remakes
    the monomials there. The full path is therefore never dearer where its sums and monomials fit, and the choice is
    one of memory.

    Args:
        heads: H.
        tokens: The larger of Nq and Nk.
        width: D of a block.
        value_width: Dv of a block.
        terms: P.
        itemsize: Bytes of an element of the sums.
        device: Type of the device, ``"cpu"`` or another.
        config: Settings of the operator.
    """
    budget = _CPU_BUFFER_BYTES if device == "cpu" else _DEVICE_BUFFER_BYTES
    full = _plan_full(heads, tokens, width, value_width, terms, itemsize, budget, config)
    if config.path == "full":
        return full
    state = taylor_feature_count(width, terms) * (value_width + 1) * itemsize
    made = monomial_count(width + 1, full.degree) * full.tokens * itemsize
    if config.path == "auto" and state <= _STATE_BYTES and made <= _STATE_BYTES:
        return full
    return _plan_streaming(heads, tokens, width, value_width, terms, itemsize, budget, config)


def _plan_full(
    heads: int,
    tokens: int,
    width: int,
    value_width: int,
    terms: int,
    itemsize: int,
    budget: int,
    config: TaylorConfig,
) -> Plan:
    """Sizes of the full path."""
    direct = terms <= _DIRECT_TERMS
    degree = terms - 1 if direct else terms - 2
    rows = monomial_count(width + 1, degree)
    chunk = config.key_chunk or _fit(budget // (rows * itemsize))
    chunk = min(chunk, max(tokens, 1))
    together = min(heads, max(1, budget // (rows * chunk * itemsize)))
    group = 0 if direct else min(_FULL_GROUP, width)
    return Plan(False, width + 1, degree, together, chunk, group, rows, value_width)


def _plan_streaming(
    heads: int,
    tokens: int,
    width: int,
    value_width: int,
    terms: int,
    itemsize: int,
    budget: int,
    config: TaylorConfig,
) -> Plan:
    """Sizes of the streaming path."""
    degree = max(terms - 2, 0)
    features = config.feature_chunk or _FEATURES_AT_ONCE
    columns = value_width if config.value_chunk is None else min(config.value_chunk, value_width)
    group = max(1, min(width, features, _COLUMNS_AT_ONCE // (columns + 1)))
    rows = max(1, min(features // group, monomial_count(width + 1, degree)))
    # Besides the monomials and their scratch, the products are as large as the monomials or larger.
    widest = max(2 * rows, group * (columns + 1))
    chunk = config.key_chunk or _fit(budget // (widest * itemsize))
    chunk = min(chunk, max(tokens, 1))
    together = min(heads, max(1, budget // (widest * chunk * itemsize)))
    return Plan(True, width + 1, degree, together, chunk, group, rows, columns)


def _fit(tokens: int) -> int:
    """Round a number of tokens down to a multiple of the fewest, and keep it in its range."""
    fewest, most = _TOKENS
    return min(max(tokens // fewest * fewest, fewest), most)
