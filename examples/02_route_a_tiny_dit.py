"""Route the attention of a model without touching the model: who answers, why the others did not, how far off it is.

    uv run python examples/02_route_a_tiny_dit.py

The model is a small diffusion transformer that calls torch's own attention. ``SdpaMode`` catches these calls and hands
each, with the exact attention it would have had, to one handler. The handler here is a router behind a probe.
"""

from collections.abc import Iterator
from itertools import count

import torch
from attn_dispatch import (
    AttentionCall,
    AttentionRouter,
    FidelityProbe,
    LayerKey,
    Route,
    SdpaMode,
    SigmaBelow,
    StepContext,
    TokenLayout,
)
from attn_dispatch.backends import NearFarBackend
from attn_dispatch.testing import TinyDiT
from attn_kernels import NearFarConfig, TokenGrid
from torch import Tensor

ROWS, COLUMNS, WORDS = 30, 34, 5
SIGMAS = (1.0, 0.75, 0.5, 0.25)


class MeanOfValues:
    """A backend of one's own: cheap, and wrong. It stands second, for text queries are all it would do well."""

    name = "mean of values"

    def refuses(self, call: AttentionCall) -> str | None:
        """Say what it cannot do."""
        return "it has no use for masks" if call.key_mask is not None or call.attn_bias is not None else None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer ``[B, H, Nq, Dv]``."""
        return call.v.mean(2, keepdim=True).expand(-1, -1, call.q.shape[2], -1)


def not_in_the_last_layer(call: AttentionCall) -> str | None:
    """A guard is a function: ``None`` = you may, or a sentence why not."""
    return "the last layer is always exact" if call.layer == LayerKey("single", 2) else None


def main() -> None:
    """Run four denoising steps, exactly and routed, and print what happened."""
    model = TinyDiT()
    inputs = model.example(ROWS, COLUMNS, words=WORDS)
    layout = TokenLayout(WORDS + ROWS * COLUMNS, text=((0, WORDS),), grids=(TokenGrid(WORDS, ROWS, COLUMNS),))
    layers = (*(LayerKey("double", i) for i in range(2)), *(LayerKey("single", i) for i in range(3)))

    near_far = NearFarBackend(NearFarConfig(tile=4, radius=1, top_k=8))
    router = AttentionRouter(
        [
            # The first route without an objection runs; without any, exact attention answers.
            Route(near_far, (SigmaBelow(0.9), not_in_the_last_layer)),
            Route(MeanOfValues(), (lambda call: "never wanted here",)),
        ]
    )
    probe = FidelityProbe(router)

    # The model does not say where it is, so the example does: layers run in order, once per step.
    calls: Iterator[int] = count()

    def describe(q: Tensor, k: Tensor) -> tuple[LayerKey, StepContext, TokenLayout]:
        step, layer = divmod(next(calls), len(layers))
        return layers[layer], StepContext(SIGMAS[step]), layout

    def denoise() -> Tensor:
        x = inputs["hidden_states"]
        for sigma, following in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
            velocity = model(**{**inputs, "hidden_states": x, "timestep": torch.tensor([sigma])})
            x = x + (following - sigma) * velocity
        return x

    with torch.no_grad():
        exact = denoise()
        probe.begin_run()
        with SdpaMode(probe, describe):
            routed = denoise()
        probe.end_run()

    print("Who answered:", router.report.counts())
    print("Why others did not:")
    for reason, number in router.report.declines().items():
        print(f"  {number:2} x {reason}")
    print("\nlayer      sigma  error of the answer (relative L2)")
    for row in probe.rows():
        print(f"{row.layer!s:10} {row.sigma:5}  {row.relative_l2:.4f}")
    print(f"\nError of the result: {((routed - exact).norm() / exact.norm()).item():.4f}")


if __name__ == "__main__":
    main()
