"""How well a truncated Taylor series stands in for the softmax, and what helps when it does not.

    uv run python examples/01_taylor_vs_softmax.py

The flatter the scores of a query, the better a polynomial can replace ``exp``. The tables show where that ends, what
centring and parity do, and what it costs; the last one shows what joining exact neighbours under one denominator adds.
"""

import torch
from attn_kernels import (
    NearFarConfig,
    TaylorConfig,
    TokenGrid,
    fidelity,
    fit_projection,
    hybrid_attention,
    near_far_attention,
    softmax_attention,
    taylor_attention,
    window_attention_2d,
)
from attn_kernels.cost import AttentionShape, exact_work, taylor_work
from attn_kernels.testing import make_qkv
from torch import Tensor

HEADS, TOKENS, WIDTH = 2, 500, 16
SPREADS = (0.5, 1.0, 2.0, 3.0)


def error(out: Tensor, exact: Tensor) -> str:
    """Relative L2 error in percent, and how many queries have no answer."""
    answered = torch.isfinite(out).all(-1)
    missing = 1 - answered.double().mean().item()
    if not answered.any():
        return "no answer"
    text = f"{100 * fidelity(out[answered][None, None], exact[answered][None, None]).relative_l2:.3g} %"
    return text if missing == 0 else f"{text} ({missing:.0%} none)"


def row(name: str, cells: list[str]) -> None:
    """Print one line of a table."""
    print(f"{name:<30}" + "".join(f"{cell:>18}" for cell in cells))


def taylor_against_softmax() -> None:
    """Error of the series by the spread of the scores."""
    row("standard deviation of scores", [f"{spread:g}" for spread in SPREADS])
    sets = [make_qkv(1, HEADS, TOKENS, WIDTH, logit_std=spread, seed=1) for spread in SPREADS]
    # Trained queries and keys have a common part; centring takes it out of the series, exactly.
    sets = [(q + 0.5, k + 1.0, v) for q, k, v in sets]
    exact = [softmax_attention(*tensors).out for tensors in sets]
    plain = TaylorConfig(centre=False)
    for name, terms, config in (
        ("P = 3, not centred", 3, plain),
        ("P = 3", 3, TaylorConfig()),
        ("P = 4, not centred", 4, plain),
        ("P = 4", 4, TaylorConfig()),
        ("P = 5", 5, TaylorConfig()),
        ("P = 5, least squares", 5, TaylorConfig(coefficients="hermite")),
    ):
        outs = [taylor_attention(*tensors, terms=terms, config=config).out for tensors in sets]
        row(name, [error(out, wanted) for out, wanted in zip(outs, exact, strict=True)])
    mean = [v.mean(2, keepdim=True).expand_as(v) for _, _, v in sets]
    row("the mean of all values", [error(out, wanted) for out, wanted in zip(mean, exact, strict=True)])


def cost_of_the_series() -> None:
    """Operations of the series as a share of exact attention's."""
    lengths = (1024, 4096, 16384, 65536)
    row("\ntokens", [f"{length}" for length in lengths])
    for width, terms in ((16, 3), (16, 4), (128, 3)):
        shapes = [AttentionShape(1, HEADS, length, length, width, width) for length in lengths]
        shares = [taylor_work(shape, terms=terms).flops / exact_work(shape).flops for shape in shapes]
        row(f"head width {width}, P = {terms}", [f"{share:.2g} of exact" for share in shares])


def neighbours_help() -> None:
    """An image: what lies near by, exactly, and the rest cheaply."""
    grid = TokenGrid(start=8, rows=22, columns=23)
    q, k, v = make_qkv(1, HEADS, grid.stop, WIDTH, logit_std=2.0, seed=2, smooth_grid=grid)
    # A head that looks around itself: keys resemble the queries of their place.
    k = 0.6 * q / q.std() + 0.8 * k
    exact = softmax_attention(q, k, v).out
    print(f"\nAn image of {grid.rows} x {grid.columns} tokens behind {grid.start} of text, spread 2")
    for name, out in (
        ("Taylor, P = 3", taylor_attention(q, k, v).out),
        ("window of 7 x 7 alone", window_attention_2d(q, k, v, grids=[grid], radius=3).out),
        ("both, one denominator", hybrid_attention(q, k, v, fit_projection(q, k, rank=8), grids=[grid], radius=3).out),
        ("near-far", near_far_attention(q, k, v, grids=[grid], config=NearFarConfig(4, 1, 2)).out),
    ):
        row(name, [error(out, exact)])


def main() -> None:
    """Print the tables."""
    taylor_against_softmax()
    cost_of_the_series()
    neighbours_help()


if __name__ == "__main__":
    main()
