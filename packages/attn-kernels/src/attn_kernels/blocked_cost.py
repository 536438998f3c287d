"""What Taylor attention costs in its torch form, which depends on how the work is cut.

``cost.taylor_work`` counts every feature once, as the kernels make them. The torch form keeps the sums over the keys in
memory: every chunk of tokens passes over all of them, and chunks are the shorter the more features there are. Where the
sums are held a part at a time, every part loads all keys, values and queries anew.
"""

from functools import lru_cache
from math import ceil

import torch

from attn_kernels.cost import AttentionShape
from attn_kernels.device_model import Work
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.features import monomial_count
from attn_kernels.taylor.plan import Plan, make_plan

_DEFAULT = TaylorConfig()
_OWN_CACHE, _SHARED_CACHE = 1 << 20, 1 << 23
"""Bytes of sums that stay in a core's own cache, and in its part of the shared one."""
_PASS = (0.2, 1.3, 2.0)
"""Time of a pass over sums in these caches and beyond, as a multiple of what the rate of memory says.

The shared cache is taken to be shared: alone on the chip a pass over sums in it takes half of this.
"""
_FIRST_LOAD, _LOAD = 7.0, 3.0
"""Reads and writes of memory that bringing one number of a token into a buffer takes, for the first time and again."""
_CALLS, _PREPARING = 22, 40
"""Calls of torch besides those for features: to load, divide and write a chunk, and to centre a group of heads.

Views count, too: making one takes as long as a small operation.
"""
_PROBED = 20.0
"""Reads and writes of each number, and products for each score, that a probe of denominators takes."""
_MADE_PER_PRODUCT = 8
"""Monomials made, in rows that stay in the cache, in the time of one product of a coordinate and a value."""


@lru_cache(maxsize=256)
def taylor_blocked_work(
    shape: AttentionShape, *, terms: int, config: TaylorConfig = _DEFAULT, device: str = "cpu"
) -> Work:
    """Work of Taylor attention in its torch form (``impl="blocked"``), with the sizes that it chooses for itself.

    Args:
        shape: Sizes.
        terms: P.
        config: Settings of the operator: path, chunks and independent blocks of columns.
        device: Type of the device, ``"cpu"`` or another.

    Raises:
        ValueError: The number of terms is out of range.
    """
    width, columns = shape.width // config.blocks, shape.value_width // config.blocks
    itemsize = torch.float32.itemsize
    plan = make_plan(
        heads=shape.heads,
        tokens=max(shape.queries, shape.keys),
        width=width,
        value_width=columns,
        terms=terms,
        itemsize=itemsize,
        device=device,
        config=config,
    )
    rows = float(shape.batch * shape.heads * config.blocks)
    tokens = rows * (shape.queries + shape.keys)
    features, factors, parts = _count(plan)
    sums = features * (columns + 1)
    made, loads, calls = _per_token(plan, columns, parts)
    # A chunk of keys reads and writes the sums, a chunk of queries reads them.
    key_chunks, query_chunks = ceil(shape.keys / plan.tokens), ceil(shape.queries / plan.tokens)
    held = sums * itemsize * (1 / parts if plan.streaming else plan.heads)
    passes = rows * sums * (2 * key_chunks + query_chunks) * _PASS[(held > _OWN_CACHE) + (held > _SHARED_CACHE)]
    spilled = 2 * made if plan.rows * plan.tokens * itemsize > _SHARED_CACHE else 0
    products = tokens * (factors * (columns + 1) + made / _MADE_PER_PRODUCT)
    # A last, shorter chunk needs views of every row of the buffer.
    views = 0 if plan.streaming else 3 * (plan.variables - 1) * max(plan.degree - 1, 0)
    shorter = (shape.keys % plan.tokens > 0) + (shape.queries % plan.tokens > 0)
    fixed = _PREPARING + parts * (10 + 20 * plan.degree) + shorter * views
    groups = shape.batch * config.blocks * ceil(shape.heads / plan.heads)
    return Work(
        "taylor_blocked",
        2.0 * tokens * sums,
        0.0,
        products,
        shape.values + passes + tokens * (loads + spilled),
        groups * (fixed + (key_chunks + query_chunks) * calls),
    )


def with_denominator_probe(work: Work, shape: AttentionShape, *, queries: int) -> Work:
    """Add to the work of a call that of its ``denominator_probe`` by the reference.

    Args:
        work: Of the call.
        shape: Sizes; blocks of a head count as heads.
        queries: Queries that are probed in each head.
    """
    rows = float(shape.batch * shape.heads)
    numbers, scores = rows * (shape.queries + shape.keys) * shape.width, rows * queries * shape.keys
    return work._replace(values=work.values + _PROBED * numbers, products=work.products + _PROBED * scores)


def _count(plan: Plan) -> tuple[int, int, int]:
    """Features with their duplicates; coordinates multiplied by values; parts of the sums that are held in turn."""
    features = factors = parts = 0
    for first, last, rows in plan.groups():
        turns = ceil(rows / plan.rows) if plan.streaming else 1
        features += (last - first) * rows
        factors += (last - first) * turns * (plan.group > 0)
        parts += turns
    return features, factors, parts


def _per_token(plan: Plan, columns: int, parts: int) -> tuple[float, float, int]:
    """Monomials made and numbers loaded for one token, and torch's calls for one chunk of tokens."""
    # A key brings its values and a query does not. The first load crosses memory against the order of its rows, the
    # further ones of a streaming path find the tokens in a cache.
    numbers = plan.variables + columns / 2
    if not plan.streaming:
        made = monomial_count(plan.variables, plan.degree) if plan.degree > 1 else 0
        calls = _CALLS + (plan.variables - 1) * max(plan.degree - 1, 0) + (3 + plan.group) * parts
        return made, _FIRST_LOAD * numbers, calls
    turns = ceil(columns / max(plan.columns, 1)) * parts
    gathered = sum(rows for *_, rows in plan.groups()) * max(1, 2 * plan.degree - 1)
    return turns / parts * gathered, (_FIRST_LOAD + _LOAD * (turns - 1)) * numbers, (12 + plan.group // 2) * turns
