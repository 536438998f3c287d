"""Time the operators against torch's exact attention, in one process and on one thread.

    python packages/attn-kernels/benchmarks/bench_operators.py --tokens 1024,4096 --width 32

Every operator is first compared with its specification on sampled queries of the very tensors that are timed; if one
differs, no ratio is printed and the exit status is 1. Times are process CPU seconds, the smallest of several rounds
that alternate between the operators. Fidelity is the distance from exact attention on synthetic data, smooth fields
plus noise; it does not say how far a model's images move.
"""

import argparse
import csv
import ctypes
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from attn_kernels import (
    NearFarConfig,
    TokenGrid,
    fidelity,
    kernel_regression,
    landmark_attention,
    near_far_attention,
    near_far_keys,
    select_tiles,
    softmax_attention,
    strided_landmarks,
)
from attn_kernels.testing import error_ratio, make_qkv
from torch import Tensor
from torch.nn import functional as F

SAMPLED = 64
"""Queries on which an operator is compared with its specification and with exact attention."""
LARGEST_ERROR = 1e-5
"""Relative error of an operator against its specification above which no ratio is printed."""


@dataclass(frozen=True)
class Case:
    """One operator on given tensors.

    Attributes:
        name: What it is called in the table.
        keys: Mean number of keys that a query meets; NaN where the operator has no such number.
        run: Computes ``[B, H, N, D]``.
        expected: Computes the specification's answer for the sampled queries, ``[B, H, SAMPLED, D]``.
    """

    name: str
    keys: float
    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, memory in MiB."""

    operator: str
    tokens: int
    width: int
    heads: int
    keys: float
    milliseconds: float
    speed_up: float
    extra_memory: float
    error_to_specification: float
    relative_l2: float
    cosine_distance: float


def make_cases(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, grid: TokenGrid, arguments: argparse.Namespace
) -> list[Case]:
    """Build the baseline, first, and the operators."""
    length = q.shape[2]
    some = q[:, :, rows]
    cases = [
        Case(
            "exact",
            length,
            lambda: F.scaled_dot_product_attention(q, k, v),
            lambda: softmax_attention(some, k, v).out,
        )
    ]
    for tile, top_k in arguments.near_far:
        cases.append(near_far_case(q, k, v, rows, grid, NearFarConfig(tile, arguments.radius, top_k)))
    index = strided_landmarks(length, [(0, grid.start)], fraction=0.08, minimum=64, maximum=512)
    gathered = (k[:, :, index], v[:, :, index])
    cases.append(
        Case(
            "landmark 8%",
            len(index),
            lambda: landmark_attention(q, k, v, index).out,
            lambda: softmax_attention(some, *gathered).out,
        )
    )
    maps = torch.randn(2, q.shape[-1], arguments.features, generator=torch.Generator().manual_seed(1))
    phi_q, phi_k = (F.elu(x @ weights / q.shape[-1] ** 0.5) + 1 for x, weights in zip((q, k), maps, strict=True))
    weights = phi_q[:, :, rows] @ phi_k.mT
    cases.append(
        Case(
            f"kernel regression F{arguments.features}",
            math.nan,
            lambda: kernel_regression(phi_q, phi_k, v).out,
            lambda: (weights / weights.sum(-1, keepdim=True)) @ v,
        )
    )
    return cases


def near_far_case(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, grid: TokenGrid, config: NearFarConfig) -> Case:
    """Build near-far attention with one configuration; choosing the tiles is part of what is timed."""

    def expected() -> Tensor:
        chosen = select_tiles(q, k, grids=[grid], config=config)
        return near_far_attention(
            q[:, :, rows], k, v, grids=[grid], config=config, selection=chosen, query_positions=rows
        ).out

    return Case(
        f"near-far t{config.tile} r{config.radius} k{config.top_k}",
        near_far_keys([grid], q.shape[2], config),
        lambda: near_far_attention(q, k, v, grids=[grid], config=config).out,
        expected,
    )


def extra_memory(run: Callable[[], Tensor]) -> float:
    """Return how far the resident memory rises above its level during a run, in MiB; NaN where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kib("VmRSS")
        run()
        return (status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return math.nan


def status_kib(field: str) -> int:
    """Read a size from the process status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(tokens: int, width: int, arguments: argparse.Namespace) -> list[Row] | None:
    """Compare and time every operator at one size; ``None`` if one differs from its specification."""
    side = math.isqrt(tokens)
    grid = TokenGrid(arguments.text, side, side)
    q, k, v = make_qkv(1, arguments.heads, grid.stop, width, logit_std=2.0, smooth_grid=grid)
    rows = torch.randperm(grid.stop, generator=torch.Generator().manual_seed(0))[:SAMPLED]
    cases = make_cases(q, k, v, rows, grid, arguments)
    exact = cases[0].expected()
    outputs = {case.name: case.run()[:, :, rows] for case in cases}
    errors = {case.name: error_ratio(outputs[case.name], case.expected()) for case in cases}
    wrong = {name: error for name, error in errors.items() if not error <= LARGEST_ERROR}
    if wrong:
        print(f"tokens {tokens}, width {width}: not what the specification says, relative error {wrong}")
        return None
    memory = {case.name: extra_memory(case.run) for case in cases}
    best = dict.fromkeys(errors, math.inf)
    for _ in range(arguments.repeats):
        for case in cases:
            start = time.process_time()
            case.run()
            best[case.name] = min(best[case.name], time.process_time() - start)
    table = []
    for case in cases:
        found = fidelity(outputs[case.name], exact)
        table.append(
            Row(
                operator=case.name,
                tokens=grid.stop,
                width=width,
                heads=arguments.heads,
                keys=case.keys,
                milliseconds=1e3 * best[case.name],
                speed_up=best["exact"] / best[case.name],
                extra_memory=memory[case.name],
                error_to_specification=errors[case.name],
                relative_l2=found.relative_l2,
                cosine_distance=found.cosine_distance,
            )
        )
    return table


def write(path: Path, table: list[Row], arguments: argparse.Namespace) -> None:
    """Write the table as CSV, or as JSON with the machine and the settings."""
    rows = [asdict(row) for row in table]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    facts = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    # JSON has no NaN; a number that does not exist is null.
    clean = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    path.write_text(
        json.dumps({"facts": {**facts, "threads": 1}, "settings": settings, "rows": clean}, indent=2) + "\n"
    )


def numbers(text: str) -> list[int]:
    """Read ``1024,4096``."""
    return [int(part) for part in text.split(",")]


def pairs(text: str) -> list[tuple[int, int]]:
    """Read ``4:8,8:2`` as pairs of tile and top_k."""
    return [(int(tile), int(top_k)) for tile, _, top_k in (part.partition(":") for part in text.split(","))]


def main() -> int:
    """Run the benchmark; 1 if an operator differs from its specification."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default=[1024, 4096], help="image tokens; the grid is square")
    parser.add_argument("--width", type=numbers, default=[128], help="head widths D")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--text", type=int, default=12, help="text tokens before the image")
    parser.add_argument("--near-far", type=pairs, default=[(4, 0), (4, 8), (8, 0), (8, 2)], help="tile:top_k,...")
    parser.add_argument("--radius", type=int, default=1)
    parser.add_argument(
        "--features", type=int, default=64, help="width F of the feature map, not part of what is timed"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a path that ends in .csv or .json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: list[Row] = []
    with torch.inference_mode():
        for tokens in arguments.tokens:
            for width in arguments.width:
                rows = measure(tokens, width, arguments)
                if rows is None:
                    return 1
                print(f"\n{rows[0].tokens} tokens, {arguments.heads} heads of width {width}, float32, one thread")
                print(f"{'operator':24}{'keys':>8}{'CPU ms':>10}{'speed-up':>10}{'MiB':>8}{'rel L2':>9}{'cosine':>9}")
                for row in rows:
                    print(
                        f"{row.operator:24}{row.keys:8.0f}{row.milliseconds:10.1f}{row.speed_up:10.2f}"
                        f"{row.extra_memory:8.0f}{row.relative_l2:9.4f}{row.cosine_distance:9.4f}"
                    )
                table += rows
    if arguments.out is not None:
        write(arguments.out, table, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
