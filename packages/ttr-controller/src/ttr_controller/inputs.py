"""What a policy may know about a diffusion step beyond the step itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attn_dispatch.call import StepContext
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Further inputs of one step; a guard records what it gave the policy, and learning gives the same again.

    Attributes:
        text: ``[T]``, pooled text embedding of the prompt; ``None`` if unknown.
        previous_error: ``[L]``, measured relative error of each layer's attention in the step before; ``None`` if
            unknown, as in the first step.
    """

    text: Tensor | None = None
    previous_error: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("previous_error", self.previous_error)):
            if value is not None and value.ndim != 1:
                raise ValueError(f"{name} must be a vector, got shape {tuple(value.shape)}")


InputSource = Callable[[StepContext], StepInputs]
"""Asked once per diffusion step, before the policy decides."""

Policy = Callable[..., Tensor]
"""A policy as guards and learning see it: a step, and its further inputs if there are any, to logits.

Logits are ``[L]`` (full attention against one alternative) or ``[L, A]`` (one column per attention, 0 = full).
"""


def ask(policy: Policy, step: StepContext, inputs: StepInputs | None) -> Tensor:
    """Logits of a policy for one step; policies without further inputs need not know of them."""
    logits: Tensor = policy(step) if inputs is None else policy(step, inputs)
    return logits


def fixed_inputs(text: Tensor | None) -> InputSource:
    """A source that gives every step the same pooled text embedding ``[T]``, averaged over rows if ``[B, T]``."""
    pooled = text if text is None or text.ndim == 1 else text.mean(dim=0)
    inputs = StepInputs(None if pooled is None else pooled.detach().to("cpu", torch.float32))
    return lambda step: inputs
