"""Gates that learn by the gradient of the final error, through the whole sampling run.

Every (step, layer) slot gets a gate between 0 (student) and 1 (full attention), drawn from a binary concrete
distribution (Maddison, Mnih & Teh 2017, "The concrete distribution", appendix B): a sigmoid of the slot's logit plus
logistic noise, divided by a temperature. Attention answers ``full + (1 - gate) * (student - full)``, and the error of
the final latent is differentiated back through all steps.

More full attention helps nearly every slot, but the budget is fixed. What a slot is worth is therefore its gradient
minus the common price of full attention, the mean gradient over all slots weighted by how far each gate can move.
Steps are scaled by one number for all slots, not by one for each as in Adam: how *much* a slot matters is the answer
that is looked for.

The student's answer enters as a constant: the gradient of a gate sees the exact difference between student and full
attention, and the gradient of the states before flows through full attention alone. That is right to first order in the
student's error, needs no differentiable student, and keeps no activation of it.

Memory holds the activations of one step at a time: each step is evaluated again on the way back (Chen et al. 2016,
"Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from attn_dispatch.call import AttentionCall, LayerKey, NativeAttention
from attn_dispatch.router import Backend
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from ttr_distill.distributed import World
from ttr_distill.grad import plain, training_mode
from ttr_distill.metrics import MetricSink
from ttr_distill.seeding import stream

from ttr_controller.budget import logits_for_scores, shift_to_share
from ttr_controller.rollout import GradientModel

GateRow = dict[str, float]
EVALUATIONS_PER_STEP = 4
"""Model evaluations that one step of one image costs: forwards, again on the way back, and the way back itself."""


@dataclass(frozen=True)
class RelaxedConfig:
    """Settings of gate learning.

    Attributes:
        iterations: Gradient steps.
        learning_rate: Root mean square step of the gates' logits.
        momentum: Share of the running gradient kept in each iteration.
        shares: Shares of full attention that iterations aim at in turn; several make one ranking good at all of them.
        gate_temperature: Temperature of the concrete distribution; towards 0 gates become 0 or 1 and the gradient
            noisy.
        start_spread: Standard deviation of the logits that the starting scores are turned into.
        batch: Images per iteration.
    """

    iterations: int = 24
    learning_rate: float = 0.15
    momentum: float = 0.8
    shares: tuple[float, ...] = (0.5,)
    gate_temperature: float = 0.5
    start_spread: float = 1.5
    batch: int = 2

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1 or not self.shares:
            raise ValueError(f"iterations and batch must be >= 1 and a share be given, got {self}")
        if not all(0.0 < share < 1.0 for share in self.shares):
            raise ValueError(f"shares must lie strictly between 0 and 1, got {self.shares}")
        if not all(math.isfinite(x) and x > 0.0 for x in (self.learning_rate, self.gate_temperature)):
            raise ValueError(f"learning_rate and gate_temperature must be positive, got {self}")
        if self.start_spread < 0.0 or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"start_spread must be >= 0 and momentum in [0, 1), got {self}")


def concrete_gates(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw gates from the binary concrete distribution; differentiable in the logits.

    Args:
        logits: ``[..., L]``, high = full attention.
        temperature: Positive.
        generator: Source of the noise, on the CPU.

    Returns:
        ``[..., L]``, in (0, 1); above 0.5 with probability ``sigmoid(logits)``.
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    noise = torch.logit(uniform, eps=1e-7).to(logits)
    return torch.sigmoid((logits + noise) / temperature)


class GateHandler:
    """Attention handler that mixes full attention and a student by one gate per layer.

    Args:
        gates: ``[L]``, 1 = full attention; carries the graph.
        layers: Layers that the gates belong to; others are answered exactly.
        backend: The students.
    """

    def __init__(self, gates: Tensor, layers: Sequence[LayerKey], backend: Backend) -> None:
        self._gates = gates
        self._index = {layer: position for position, layer in enumerate(layers)}
        self._backend = backend

    def begin_run(self) -> None:
        """Nothing is kept."""

    def end_run(self) -> None:
        """Nothing is kept."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``full + (1 - gate) * (student - full)``; exact where the backend refuses."""
        full = native(call)
        position = None if call.layer is None else self._index.get(call.layer)
        if position is None or self._backend.refuses(call) is not None:
            return full
        with torch.no_grad():
            difference = self._backend(call) - full
        return full + (1.0 - self._gates[position]).to(full) * difference


class RelaxedTrainer:
    """Learns one logit per slot by gradients through the sampler.

    After every iteration all logits are shifted by one constant, so that the expected share of full attention is the
    one aimed at next: what is learnt is where to spend the budget.

    Args:
        model: Sampler whose steps can be differentiated.
        backend: The students.
        start: ``[steps, L]`` scores to start from, high = needs full attention; for example a probe's.
        config: Settings.
        seed: Seed of every draw.
        eligible: ``[L]`` bool; other layers stay full. ``None``: all.
        sinks: Get a row per iteration, the first included.
        world: The processes that learn together, each from images of its own; ``None``: this one alone.

    Raises:
        ValueError: ``start`` does not fit the model's layers.
    """

    def __init__(
        self,
        model: GradientModel,
        backend: Backend,
        start: Tensor,
        config: RelaxedConfig | None = None,
        *,
        seed: int = 0,
        eligible: Tensor | None = None,
        sinks: Sequence[MetricSink] = (),
        world: World | None = None,
    ) -> None:
        if start.ndim != 2 or start.shape[1] != len(model.layers):
            raise ValueError(f"start must be [steps, {len(model.layers)}], got {tuple(start.shape)}")
        self.model = model
        self.backend = backend
        self.config = config or RelaxedConfig()
        self.seed = seed
        self.sinks = tuple(sinks)
        self.world = world or World()
        self.iteration = 0
        with training_mode():
            everyone = torch.ones(len(model.layers), dtype=torch.bool)
            self.eligible = everyone if eligible is None else plain(eligible)
            first = logits_for_scores(
                plain(start, dtype=torch.float32), spread=self.config.start_spread, eligible=self.eligible
            )
            self.logits = first
            self._momentum = torch.zeros_like(first)
            self._square = torch.zeros((), dtype=first.dtype)

    @property
    def scores(self) -> Tensor:
        """``[steps, L]``, high = needs full attention; a ranking for ``top_k_mask`` and ``fit_policy_to_scores``."""
        return self.logits.clone()

    def evaluations(self) -> int:
        """Model evaluations that all iterations cost; a rollout costs one per step and image."""
        return (
            self.config.iterations * self.config.batch * self.world.size * self.logits.shape[0] * EVALUATIONS_PER_STEP
        )

    def step(self, prompts: Sequence[str], seeds: Sequence[int]) -> GateRow:
        """Make one gradient step on a batch.

        Returns:
            ``loss`` (relative RMSE of the final latent), ``share`` aimed at, ``iteration``.
        """
        share = self.config.shares[self.iteration % len(self.config.shares)]
        with training_mode():
            self.logits += shift_to_share(self.logits, share, eligible=self.eligible)
            own = [self.world.rank] if self.world.rank else []
            generator = stream(self.seed, "gates", self.iteration, *own)
            logits = self.logits.clone().requires_grad_()
            drawn = concrete_gates(logits, self.config.gate_temperature, generator)
            gates = torch.where(self.eligible, drawn, 1.0).detach().requires_grad_()
            # The root: a batch that is hard to draw has no more say than an easy one.
            loss = self._squared_error(gates, prompts, seeds).clamp_min(1e-12).sqrt().mean()
            (worth,) = torch.autograd.grad(loss, gates)
            (reach,) = torch.autograd.grad(drawn.sum(), logits)
            reach = torch.where(self.eligible, reach, 0.0)
            price = (worth * reach).sum() / reach.sum()
            gradient, error = reach * (worth - price), loss.detach()
            self.world.mean_([gradient, error])
            self._descend(gradient)
        self.iteration += 1
        row = {"loss": float(error), "share": share, "iteration": float(self.iteration)}
        for sink in self.sinks if self.world.main else ():
            sink.write({"step": self.iteration, "method": "relaxed", "target_full_attn_ratio": share, **row})
        return row

    def fit(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[GateRow]:
        """Make the iterations that are left, drawing batches from a pool of prompts and seeds.

        Args:
            prompts: The pool.
            seeds: One per prompt.
            should_stop: Asked before each iteration (also a place for a progress bar).

        Yields:
            One row per iteration.

        Raises:
            ValueError: The pool is smaller than the batches of all processes.
        """
        wanted = self.config.batch * self.world.size
        if not wanted <= len(prompts) == len(seeds):
            raise ValueError(f"a batch of {wanted} needs as many prompts with a seed each")
        while self.iteration < self.config.iterations:
            # All processes stop together, or those that go on would wait for ever.
            if should_stop is not None and any(self.world.gather(should_stop())):
                return
            order = torch.randperm(len(prompts), generator=stream(self.seed, "gate-batch", self.iteration))
            batch = self.world.share(order[:wanted].tolist())
            yield self.step([prompts[i] for i in batch], [seeds[i] for i in batch])

    def state_dict(self) -> dict[str, Tensor]:
        """Logits, running gradient and number of iterations, as tensors."""
        return {
            "gates.logits": self.scores,
            "gates.momentum": self._momentum.clone(),
            "gates.square": self._square.clone(),
            "gates.iteration": torch.tensor(self.iteration),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: The state has other slots.
        """
        saved = state["gates.logits"]
        if saved.shape != self.logits.shape:
            raise ValueError(f"the saved gates are {tuple(saved.shape)}, this model's {tuple(self.logits.shape)}")
        with training_mode():
            self.logits = plain(saved)
            self._momentum = plain(state["gates.momentum"])
            self._square = plain(state["gates.square"])
        self.iteration = int(state["gates.iteration"])

    def _descend(self, gradient: Tensor) -> None:
        """Step against the running gradient, scaled to the configured root mean square step."""
        keep, count = self.config.momentum, self.iteration + 1
        self._momentum = keep * self._momentum + (1.0 - keep) * gradient
        self._square = 0.9 * self._square + 0.1 * gradient.square().mean()
        scale = (self._square / (1.0 - 0.9**count)).sqrt() + 1e-12
        self.logits = self.logits - self.config.learning_rate * self._momentum / (1.0 - keep**count) / scale

    def _squared_error(self, gates: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Squared relative error ``[B]`` of the final latent under gates ``[steps, L]``."""
        path = self.model.trajectory(prompts, seeds)
        latent, exact = plain(path.latents[0]), plain(path.latents[-1])
        sigmas = plain(path.sigmas).to(latent)

        def advance(latent: Tensor, row: Tensor, step: int) -> Tensor:
            handler = GateHandler(row, self.model.layers, self.backend)
            velocity = self.model.gradient_velocity(latent, step, prompts, handler)
            return latent + (sigmas[step + 1] - sigmas[step]) * velocity

        for step in range(gates.shape[0]):
            latent = checkpoint(advance, latent, gates[step], step, use_reentrant=False)
        left = (latent - exact).float().flatten(1).square().sum(dim=1)
        return left / exact.float().flatten(1).square().sum(dim=1)
