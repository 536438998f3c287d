"""What ``dispatch_attention`` costs a call over the attention that it calls.

Both arms attend over the same tiny tensors on the CPU: one calls the attention itself, one ``dispatch_attention`` after
its first call. The arms alternate in one process; times are of this process, and medians of many short rounds.

Run: ``python packages/attn-dispatch/benchmarks/bench_dispatch.py [--json FILE]``. Exits with 1 above the target.
"""

from __future__ import annotations

import sys

import torch
from attn_dispatch.default import dispatch_attention, set_backend
from attn_dispatch.native.bindings import bind_sdpa_math
from paired import Call, compare, run
from torch.nn.functional import scaled_dot_product_attention

TARGET_US = 5.0


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


def measure(rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Compare the arms of every row."""
    rows = {}
    for name, (backend, direct, dispatched) in make_arms().items():
        set_backend(backend)
        rows[name] = compare(("direct", direct), ("dispatched", dispatched), rounds, calls)
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__.splitlines()[0], TARGET_US, measure))
