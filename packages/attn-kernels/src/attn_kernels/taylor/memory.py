"""The memory that the blocked form states: an upper bound, from sizes alone."""

import torch

from attn_kernels.taylor.config import TaylorConfig, check_terms
from attn_kernels.taylor.features import monomial_count
from attn_kernels.taylor.plan import Plan, make_plan

_DEFAULT_CONFIG = TaylorConfig()


def taylor_memory(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    value_width: int,
    *,
    terms: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    config: TaylorConfig = _DEFAULT_CONFIG,
) -> int:
    """Bytes that ``taylor_attention(..., impl="blocked")`` holds at most, besides its inputs and outputs.

    On the full path these are the sums of all features of a few heads and the buffers of one chunk of tokens; on the
    streaming path the sums of one chunk of features, those buffers, and the unfinished answers of a few heads. Some
    numbers per token are needed in either case, the largest of them the keys' weights.

    Args:
        batch: B.
        heads: H.
        queries: Nq.
        keys: Nk.
        width: D.
        value_width: Dv.
        terms: P.
        dtype: Dtype of q, k and v.
        device: Type of their device.
        config: Settings of the operator.

    Raises:
        ValueError: ``terms`` is out of range.
    """
    check_terms(terms)
    wide = torch.promote_types(dtype, torch.float32)
    width, value_width = width // config.blocks, value_width // config.blocks
    plan = make_plan(
        heads=heads,
        tokens=max(queries, keys),
        width=width,
        value_width=value_width,
        terms=terms,
        itemsize=wide.itemsize,
        device=device,
        config=config,
    )
    group, tokens = plan.heads, plan.tokens
    held = _streaming(plan, queries, terms, config) if plan.streaming else _full(plan, config)
    # Logits of the keys' weights on the way to the weights, and the weights of the heads before.
    held += group * keys * 6
    # Centring and loading convert a chunk where the inputs are of lower precision or masked.
    held += group * tokens * (4 * width + 2 * value_width + 12)
    if config.coefficients == "hermite":
        held += group * (3 * width * width + tokens * (2 * width + 3 * terms))
    total = held * wide.itemsize + _weights(plan, wide.itemsize)
    if config.blocks > 1:
        total += config.blocks * batch * heads * queries * (wide.itemsize + 2)
    return total


def _full(plan: Plan, config: TaylorConfig) -> int:
    """Elements of the full path."""
    columns = plan.columns + 1
    made = sum(monomial_count(plan.variables, degree) for degree in range(2, plan.degree + 1))
    buffers = plan.tokens * (plan.variables + made + columns + plan.group * columns)
    states = [(last - first) * columns * rows for first, last, rows in plan.groups()]
    scratch = 0 if config.store == "float32" else 2 * max(states)
    return plan.heads * (buffers + sum(states) + scratch)


def _streaming(plan: Plan, queries: int, terms: int, config: TaylorConfig) -> int:
    """Elements of the streaming path."""
    columns = plan.columns + 1
    buffers = plan.tokens * (plan.variables + 2 * plan.rows + columns + plan.group * columns)
    # The state of the chunk of features before is freed when the next one stands.
    state = 2 * plan.group * columns * plan.rows
    scratch = 0 if config.store == "float32" else state // 2
    # Answers of the value columns before are freed when the next ones stand; denominators and the factors made of them.
    answers = queries * (2 * columns + 2)
    fitted = queries * (terms + 1) if config.coefficients == "hermite" else 0
    return plan.heads * (buffers + state + scratch + answers + fitted)


def _weights(plan: Plan, itemsize: int) -> int:
    """Bytes of the indices and weights of one group of features, while they are made."""
    indices = plan.rows * 8 * (3 * plan.degree + 6)
    weights = plan.rows * itemsize * (5 * max(plan.group, 1) + 6)
    return indices + weights
