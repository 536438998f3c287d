"""What ``dispatch_attention`` costs a call over the attention that it calls.

Both arms attend over the same tiny tensors on the CPU: one calls the attention itself, one ``dispatch_attention`` after
its first call. The arms alternate in one process; times are of this process, and medians of many short rounds.

Run: ``python packages/attn-dispatch/benchmarks/bench_dispatch.py [--json FILE]``. Exits with 1 above the target.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from attn_dispatch.default import dispatch_attention, set_backend
from attn_dispatch.native.bindings import bind_sdpa_math
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TARGET_US = 5.0
Call = Callable[[], Tensor]


def make_arms() -> dict[str, tuple[str, Call, Call]]:
    """Return for each row the backend, the attention itself, and its dispatch."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 16, generator=g) for _ in range(3))
    mask = torch.rand(1, 1, 8, 8, generator=g) > 0.3
    mask[..., 0] = True
    math = bind_sdpa_math(torch).dense
    return {
        "SDPA": ("sdpa", lambda: scaled_dot_product_attention(q, k, v), lambda: dispatch_attention(q, k, v)),
        "SDPA, mask": (
            "sdpa",
            lambda: scaled_dot_product_attention(q, k, v, mask),
            lambda: dispatch_attention(q, k, v, mask),
        ),
        "SDPA, scale": (
            "sdpa",
            lambda: scaled_dot_product_attention(q, k, v, scale=0.3),
            lambda: dispatch_attention(q, k, v, scale=0.3),
        ),
        "another kernel": ("sdpa_math", lambda: math(q, k, v, None, 0.0, None), lambda: dispatch_attention(q, k, v)),
    }


def microseconds(call: Call, calls: int) -> float:
    """Process time of one call."""
    start = time.process_time_ns()
    for _ in range(calls):
        call()
    return (time.process_time_ns() - start) / calls / 1e3


def measure(direct: Call, dispatched: Call, rounds: int, calls: int) -> dict[str, float]:
    """Compare both arms; medians over paired rounds, whose order alternates."""
    if not torch.equal(direct(), dispatched()):
        raise SystemExit("the arms differ")
    pairs = []
    for one in range(rounds):
        if one % 2:
            second, first = microseconds(dispatched, calls), microseconds(direct, calls)
        else:
            first, second = microseconds(direct, calls), microseconds(dispatched, calls)
        pairs.append((first, second))
    return {
        "direct_us": statistics.median(first for first, _ in pairs),
        "dispatched_us": statistics.median(second for _, second in pairs),
        "overhead_us": statistics.median(second - first for first, second in pairs),
    }


def main() -> int:
    """Print the table and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    with torch.inference_mode():
        for name, (backend, direct, dispatched) in make_arms().items():
            set_backend(backend)
            rows[name] = measure(direct, dispatched, arguments.rounds, arguments.calls)
    write = sys.stdout.write
    write(f"{'attention':<16}{'direct us':>11}{'dispatched us':>15}{'overhead us':>13}{'target':>8}\n")
    for name, row in rows.items():
        write(f"{name:<16}{row['direct_us']:>11.2f}{row['dispatched_us']:>15.2f}{row['overhead_us']:>13.2f}")
        write(f"{TARGET_US:>8.0f}\n")
    if arguments.json is not None:
        machine = {"platform": platform.platform(), "processor": platform.processor(), "cpus": os.cpu_count()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"rows": rows, "target_us": TARGET_US, **machine, **versions}, indent=1))
    return int(any(row["overhead_us"] > TARGET_US for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
