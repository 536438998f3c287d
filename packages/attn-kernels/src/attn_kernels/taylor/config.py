"""Settings of Taylor attention."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from attn_kernels.checks import resolve_scale

Coefficients = Literal["taylor", "hermite"]
Mode = Literal["whole", "independent"]
Path = Literal["auto", "streaming", "full"]
Store = Literal["float32", "bfloat16"]

MAX_TERMS = 8
"""Largest number of terms of the series."""


@dataclass(frozen=True)
class TaylorConfig:
    """How the series is expanded and computed.

    The first five fields define the function and ``eps`` which queries go unanswered; the others say how it is
    computed.

    Attributes:
        centre: Expand around the mean query and the mean key. Exact: the mean key cancels in a softmax, and the mean
            query becomes a weight ``exp(scale * mean_q . k_j)`` of each key, so that only the residual logits are
            approximated. The largest single gain in accuracy, for a few percent of the time.
        coefficients: ``"taylor"`` = ``1 / p!``; ``"hermite"`` = for each query the polynomial nearest to ``exp`` in
            least squares under a Gaussian of that query's logit variance. Needs ``centre``.
        hermite_limit: Standard deviation of a query's logits from which ``"hermite"`` uses ``1 / p!`` for this query,
            because the fitted polynomial would become negative.
        blocks: Cut D and Dv into this many blocks, each attended on its own (``mode="independent"``).
        mode: ``"whole"`` = attention of the whole head. ``"independent"`` = ``blocks`` times as many heads of width
            ``D / blocks``: another function, not an approximation of the head, for models trained with it.
        path: ``"full"`` keeps the summed features of all keys, ``"streaming"`` a chunk of them at a time, ``"auto"``
            is full where it fits.
        feature_chunk: Features held at a time by the streaming path; chosen if ``None``.
        value_chunk: Value columns held at a time by the streaming path; Dv, within the budget, if ``None``.
        key_chunk: Tokens, keys or queries, handled at a time; chosen if ``None``.
        store: Dtype in which the summed values are held between the pass over the keys and the pass over the queries.
            Sums and the denominator are float32 in either case.
        eps: A query whose denominator is at most ``eps`` times the sum of the key weights has no answer: NaN.
    """

    centre: bool = True
    coefficients: Coefficients = "taylor"
    hermite_limit: float = 1.2
    blocks: int = 1
    mode: Mode = "whole"
    path: Path = "auto"
    feature_chunk: int | None = None
    value_chunk: int | None = None
    key_chunk: int | None = None
    store: Store = "float32"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        choices = {"coefficients": Coefficients, "mode": Mode, "path": Path, "store": Store}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} must be one of {get_args(choice)}, got {getattr(self, name)!r}")
        if self.coefficients == "hermite" and not self.centre:
            raise ValueError("coefficients='hermite' are fitted to centred logits; it needs centre=True")
        if not 0.0 <= self.hermite_limit < float("inf"):
            raise ValueError(f"hermite_limit must be a finite number of at least 0, got {self.hermite_limit}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if self.blocks > 1 and self.mode != "independent":
            raise ValueError(
                f"blocks={self.blocks} attends each block of columns on its own, which does not approximate the head; "
                "say mode='independent' to have it"
            )
        for name in ("feature_chunk", "value_chunk", "key_chunk"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")


def check_terms(terms: int) -> None:
    """Check the number of terms.

    Raises:
        ValueError: It is not in 1..8.
    """
    if not 1 <= terms <= MAX_TERMS:
        raise ValueError(f"terms must be in 1..{MAX_TERMS}, got {terms}")


def check_blocks(q: Tensor, scale: float | None, config: TaylorConfig) -> float:
    """Check that the heads of q ``[B, H, Nq, D]`` can be cut into the blocks of ``config``; return the score scale.

    Raises:
        ValueError: D cannot be cut, or the scale is left open with more than one block.
    """
    width = q.shape[-1]
    if width == 0 or width % config.blocks:
        raise ValueError(f"q {tuple(q.shape)} cannot be cut into blocks={config.blocks} equal blocks of columns")
    if config.blocks > 1 and scale is None:
        raise ValueError(
            f"blocks={config.blocks} needs an explicit scale: {width // config.blocks}**-0.5 for heads of the blocks' "
            f"width, {width}**-0.5 for scores that are parts of the head's"
        )
    return resolve_scale(scale, width)
