"""What a policy chose, step by step, as a short record for a report."""

from __future__ import annotations

from collections.abc import Sequence

from attn_dispatch.call import LayerKey, StepContext


class RoutingRecord:
    """Takes a guard's choices once per diffusion step; give it as ``on_step`` of a ``PolicyGuard``.

    Args:
        layers: Layers that choices belong to.
        names: Names of the attentions by number; the first is full attention's.
        max_steps: Steps kept; the oldest go first.
    """

    def __init__(
        self, layers: Sequence[LayerKey], names: Sequence[str] = ("full", "student"), *, max_steps: int = 1000
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        self._layers = tuple(layers)
        self._names = tuple(names)
        self._max_steps = max_steps
        self._steps: list[tuple[StepContext, tuple[int, ...]]] = []

    def __call__(self, step: StepContext, choices: tuple[int, ...]) -> None:
        """Take one step's choices."""
        self._steps.append((step, choices))
        del self._steps[: -self._max_steps]

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    def lines(self) -> list[str]:
        """One line per step: its noise level, and the layers of every attention but full."""
        found = []
        for step, choices in self._steps:
            parts = []
            for number, name in enumerate(self._names[1:], start=1):
                own = [str(layer) for layer, choice in zip(self._layers, choices, strict=True) if choice == number]
                parts.append(f"{name} in {len(own)} of {len(choices)} layers" + (f" ({', '.join(own)})" if own else ""))
            found.append(f"sigma {step.sigma:.3f}: {'; '.join(parts)}")
        return found

    def to_dict(self) -> list[dict[str, object]]:
        """The steps as values that ``json`` can write."""
        return [
            {
                "sigma": step.sigma,
                "cfg_scale": step.cfg_scale,
                "choices": {
                    str(layer): self._names[choice] for layer, choice in zip(self._layers, choices, strict=True)
                },
            }
            for step, choices in self._steps
        ]
