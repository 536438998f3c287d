"""Which layers of which diffusion steps are trained on."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from attn_dispatch import LayerKey, StepContext
from torch import Tensor

from ttr_distill.seeding import stream
from ttr_distill.training.state import integer


class StepDraw:
    """Draws, at the first call of every diffusion step, its layers and whether it is held out.

    Of every ``period`` steps one is held out: its calls are measured, never trained on.

    Args:
        layers: All layers, in a fixed order.
        least: Train at least so many of them in a step.
        most: Train at most so many; ``None`` = all.
        period: Length of the blocks of steps of which one is held out; 0 = none is.
        spared: Hold out none of the first so many steps, a multiple of ``period``; ``None`` = of the first block.
        seed: Which.
    """

    def __init__(
        self,
        layers: Sequence[LayerKey],
        *,
        least: int,
        most: int | None,
        period: int,
        spared: int | None = None,
        seed: int,
    ) -> None:
        self._layers = tuple(layers)
        self._most = len(layers) if most is None else min(len(layers), most)
        self._least = min(self._most, least)
        self._period = period
        self._spared = period if spared is None else spared
        self._generators = {name: stream(seed, name) for name in ("layers", "heldout steps")}
        self._steps = 0
        self._heldout_at = -1
        self._now: tuple[StepContext | None, int] | None = None
        self._drawn: frozenset[LayerKey] = frozenset()
        self._seen: Counter[LayerKey] = Counter()

    @property
    def heldout(self) -> bool:
        """Whether the step drawn last is held out."""
        return self._steps - 1 == self._heldout_at

    @property
    def number(self) -> int | None:
        """How many layers the step drawn last trains; ``None`` before the first step of a run."""
        return None if self._now is None else len(self._drawn)

    def begin_run(self) -> None:
        """The next call begins a new step."""
        self._now = None
        self._seen.clear()

    def layers(self, layer: LayerKey, step: StepContext | None) -> frozenset[LayerKey]:
        """Return the layers to train in the step that this call of ``layer`` belongs to."""
        # Without a step from the host, a layer that comes again begins the next one.
        passes = 0 if step is not None else self._seen[layer]
        self._seen[layer] += 1
        if (step, passes) != self._now:
            self._now = (step, passes)
            self._next_step()
        return self._drawn

    def tensors(self) -> dict[str, Tensor]:
        """Return the random streams by name."""
        return {name.replace(" ", "_"): generator.get_state() for name, generator in self._generators.items()}

    def facts(self) -> dict[str, int]:
        """Return the counters."""
        return {"steps": self._steps, "heldout_at": self._heldout_at}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Take over what ``tensors`` and ``facts`` gave.

        Raises:
            ValueError: Something is missing.
        """
        for name, generator in self._generators.items():
            saved = tensors.get(name.replace(" ", "_"))
            if saved is None:
                raise ValueError(f"the state lacks the random stream {name!r}")
            generator.set_state(saved.cpu())
        self._steps, self._heldout_at = integer(facts, "steps"), integer(facts, "heldout_at")

    def _next_step(self) -> None:
        generator = self._generators["layers"]
        number = int(torch.randint(self._least, self._most + 1, (1,), generator=generator))
        order = torch.randperm(len(self._layers), generator=generator)[:number].tolist()
        self._drawn = frozenset(self._layers[position] for position in order)
        if self._period and self._steps >= self._spared and self._steps % self._period == 0:
            place = torch.randint(self._period, (1,), generator=self._generators["heldout steps"])
            self._heldout_at = self._steps + int(place)
        self._steps += 1
