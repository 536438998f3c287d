"""What an installed override that declines costs per attention call, over the host's own override mechanism.

Both arms run the same host call of the same tiny tensors, whose attention takes next to no time: one through an
override that does nothing but call the host's attention, one through a ``ComfyOverride`` whose router refuses, report
included. The arms alternate in one process; times are of this process, and medians of many short rounds.

Run: ``python packages/attn-dispatch/benchmarks/bench_override.py [--json FILE]``. Exits with 1 above the target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from attn_dispatch import AttentionCall, AttentionRouter, MinTokens, Route, StepContext, TokenLayout
from attn_dispatch.adapters.comfyui import install
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeModelPatcher, overridable
from attn_dispatch.adapters.comfyui_override import FACTS, INSTALLED, OVERRIDE, ModelFacts
from attn_kernels import TokenGrid
from paired import compare, run
from torch import Tensor

TARGET_US = 15.0
HEADS, WIDTH, ROWS, WORDS = 2, 16, 2, 4


class Declining:
    """A backend whose guard always says no."""

    name = "declining"

    def refuses(self, call: AttentionCall) -> str | None:
        """Say nothing against the call; the guard does."""
        return None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Never called."""
        raise AssertionError("a declined backend ran")


def host_call(options: dict[str, Any], flat: bool, output: Tensor) -> Callable[[], Tensor]:
    """Make an attention call of the host: ``flat`` as Wan makes it, else as Flux does."""
    tokens = WORDS + ROWS * ROWS
    shape = (1, tokens, HEADS * WIDTH) if flat else (1, HEADS, tokens, WIDTH)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3))

    def instant(*args: Any, **kwargs: Any) -> Tensor:
        return output

    attention = overridable(instant)
    if flat:
        return lambda: attention(q, k, v, heads=HEADS, transformer_options=options)
    return lambda: attention(q, k, v, HEADS, skip_reshape=True, mask=None, transformer_options=options)


def overhead(flat: bool, rounds: int, calls: int) -> dict[str, float]:
    """Compare both arms; medians over paired rounds."""
    tokens = WORDS + ROWS * ROWS
    output = torch.zeros(1, tokens, HEADS * WIDTH)
    names = {"block_type": "single", "block_index": 3, "img_slice": [WORDS, tokens], "cond_or_uncond": [0]}
    plain = {**names, OVERRIDE: lambda func, *args, **kwargs: func(*args, **kwargs)}
    router = AttentionRouter([Route(Declining(), (MinTokens(10**6),))])
    options = install(FakeModelPatcher(FakeFlux()), router).model_options["transformer_options"]
    layout = TokenLayout(tokens, ((0, WORDS),), (TokenGrid(WORDS, ROWS, ROWS),))
    options = {**options, **names, FACTS: {INSTALLED: ModelFacts(StepContext(0.5, 3.5, (4, 4), (0,)), layout)}}
    arms = host_call(plain, flat, output), host_call(options, flat, output)
    row = compare(("host", arms[0]), ("installed", arms[1]), rounds, calls)
    if router.report.counts() != {"native": rounds * calls + 1}:
        raise SystemExit("the router was not asked for every call")
    return row


def measure(rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Compare both layouts."""
    layouts = (("Flux: [B, H, N, D]", False), ("Wan: [B, N, H * D]", True))
    return {name: overhead(flat, rounds, calls) for name, flat in layouts}


if __name__ == "__main__":
    sys.exit(run(__doc__.splitlines()[0], TARGET_US, measure))
