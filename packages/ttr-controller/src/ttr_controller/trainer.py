"""Learns which (step, layer) slots need full attention, from whole images.

One update: K rollouts of the same prompts from the same noise, each with its own sampled masks; each rollout's reward
is compared with the mean of the others; the policy moves towards the masks that did better. After every update all
logits are shifted by one constant, so that the expected share of full attention stays at the target: what is learnt is
*where* to spend the budget, not how much of it. Candidates are compared at exactly equal cost (top-k masks of the
logits), and the best one seen on the validation images is kept, so learning never ends worse than it began.

With a target speed-up, or with several alternatives to full attention, the budget is attention time: the expected cost
is held at the target, and candidates are the likeliest plans within it.

Processes started by ``torchrun`` share the work: each makes rollouts of its own prompts, gradients are averaged, and
the main one logs.

Every random draw depends on the seed and the number of the update alone. An update that is interrupted between two
rollouts leaves nothing behind, and a resumed training goes on as if it had never stopped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from attn_dispatch.call import StepContext
from attn_dispatch.router import Backend
from torch import Tensor
from ttr_distill.distributed import World
from ttr_distill.grad import plain, training_mode
from ttr_distill.metrics import MetricSink
from ttr_distill.seeding import stream

from ttr_controller.budget import all_student, shift_to_share, slot_count, tilt_to_cost
from ttr_controller.controller_config import ControllerConfig as ControllerConfig
from ttr_controller.costs import AttentionCosts, as_choices
from ttr_controller.guard import PolicyGuard, masks_from_policy
from ttr_controller.inputs import InputSource
from ttr_controller.judge import Judge
from ttr_controller.knapsack import choices_from_logits
from ttr_controller.policy import RoutingPolicy, fit_policy_to_scores
from ttr_controller.quality.objective import QualityObjective
from ttr_controller.reinforce import EmaBaseline
from ttr_controller.rollout import Sampler, Trajectory
from ttr_controller.step_metrics import MetricRow as MetricRow
from ttr_controller.trainer_state import BestPolicy as BestPolicy
from ttr_controller.trainer_state import (
    TrainerManifest,
    TrainerState,
    pack_contexts,
    pack_optimizer,
    unfit,
    unpack_contexts,
    unpack_optimizer,
    with_prefix,
)
from ttr_controller.update import update_policy


class ControllerTrainer:
    """Trains a routing policy on a sampler.

    Args:
        sampler: Makes images; see ``Sampler``.
        backend: The students, or several alternatives to full attention in the order of the policy's actions.
        policy: Trained in place.
        config: Settings.
        seed: Seed of every draw.
        eligible: ``[L]`` bool, layers whose student may run; ``None``: all. Others are always full and do not count.
        student_cost: ``[L]``, modelled cost of a layer's student relative to full attention; ``None``: 0.
        costs: Cost of every attention in every layer, modelled or measured; takes the place of ``student_cost``.
        objective: What an image's error is; ``None``: relative RMSE of the latent.
        sinks: Get a copy of each metric row, the first included.
        inputs: Further inputs of the policy.
        world: The processes that train together; ``None``: this one alone.

    Raises:
        ValueError: Policy, sampler, backends and costs do not fit together, or no layer is eligible.
    """

    def __init__(
        self,
        sampler: Sampler,
        backend: Backend | Sequence[Backend],
        policy: RoutingPolicy,
        config: ControllerConfig | None = None,
        *,
        seed: int = 0,
        eligible: Tensor | None = None,
        student_cost: Tensor | None = None,
        costs: AttentionCosts | None = None,
        objective: QualityObjective | None = None,
        sinks: Sequence[MetricSink] = (),
        inputs: InputSource | None = None,
        world: World | None = None,
    ) -> None:
        layers = len(sampler.layers)
        if policy.layers != layers:
            raise ValueError(f"the policy has {policy.layers} layers, the sampler {layers}")
        self.sampler = sampler
        self.policy = policy
        self.config = config or ControllerConfig()
        self.seed = seed
        # A mask made in inference mode could not take part in a gradient.
        with training_mode():
            self.eligible = torch.ones(layers, dtype=torch.bool) if eligible is None else plain(eligible)
        if self.eligible.shape != (layers,) or not bool(self.eligible.any()):
            raise ValueError(f"eligible must be bool [{layers}] with at least one ready layer, got {self.eligible}")
        self.judge = Judge(sampler, backend, objective)
        self.costs = costs or AttentionCosts.of_student(torch.zeros(layers) if student_cost is None else student_cost)
        actions = len(self.judge.backends) + 1
        if policy.actions != actions or self.costs.table.shape != (layers, actions):
            raise ValueError(
                f"{actions - 1} alternatives need a policy of {actions} actions and costs [{layers}, {actions}], "
                f"got {policy.actions} and {tuple(self.costs.table.shape)}"
            )
        self.sinks = tuple(sinks)
        self.inputs = inputs
        self.world = world or World()
        self.best = BestPolicy()
        self.baseline = EmaBaseline(self.config.baseline_decay, self.config.baseline_floor)
        self.updates = 0
        self.unit = 1.0
        self._contexts: tuple[StepContext, ...] = ()
        self._validation: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
        self._errors: dict[bytes, float] = {}
        self.optimizer = self._new_optimizer()

    @property
    def contexts(self) -> tuple[StepContext, ...]:
        """Diffusion steps of the schedule that is learnt; known after ``prepare``."""
        if not self._contexts:
            raise ValueError("the sampler's steps are not known yet; call prepare(prompts, seeds) first")
        return self._contexts

    @property
    def rollouts(self) -> int:
        """Rollouts made so far, those of a resumed state included."""
        return self.updates * self.config.rollouts * self.world.size

    @property
    def judged_masks(self) -> int:
        """Masks that were sampled on the validation images since ``prepare``."""
        return len(self._errors)

    @property
    def by_cost(self) -> bool:
        """Whether the budget is attention time rather than a share of full slots."""
        return self.config.target_speed_up is not None or self.policy.actions > 2

    @property
    def target_full(self) -> float:
        """Wanted share of full attention; derived where a speed-up is wanted."""
        if self.config.target_speed_up is None:
            return self.config.target_full
        return self.costs.share_for(1.0 / self.config.target_speed_up, eligible=self.eligible)

    @property
    def target_cost(self) -> float:
        """Wanted attention cost relative to full attention in all eligible slots."""
        cheapest = self.costs.cheapest(eligible=self.eligible)
        if self.config.target_speed_up is not None:
            return max(cheapest, 1.0 / self.config.target_speed_up)
        return cheapest + (1.0 - cheapest) * self.config.target_full

    @property
    def full_slots(self) -> int:
        """Full slots among the eligible ones at the target share."""
        return slot_count(len(self.contexts), self.eligible, self.target_full)

    def prepare(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Take the images on which candidates are compared; learn the schedule's steps and the error unit.

        Args:
            prompts: A few training prompts.
            seeds: One per prompt.
        """
        self.judge.teacher.get(prompts, seeds)
        self._validation = (tuple(prompts), tuple(seeds))
        self._contexts = self.judge.teacher.contexts
        self._errors = {}
        worst = self.validation_error(all_student(len(self.contexts), self.policy.layers, eligible=self.eligible))
        self.unit = worst or 1.0

    def initialise_from_probe(self, scores: Tensor) -> float:
        """Give the policy the ranking of probe scores at the target share, and remember it as the first candidate.

        Args:
            scores: ``[steps, L]``, high = needs full attention.

        Returns:
            Root mean square distance of the policy's logits from the wanted ones.
        """
        rest = fit_policy_to_scores(
            self.policy, self.contexts, scores, spread=self.config.probe_spread, eligible=self.eligible
        )
        self.optimizer = self._new_optimizer()
        self.calibrate()
        self.validate()
        return rest

    def step(
        self, prompts: Sequence[str], seeds: Sequence[int], *, should_stop: Callable[[], bool] | None = None
    ) -> MetricRow | None:
        """Make one update from K rollouts of one batch.

        Args:
            prompts: The batch; one mask per rollout is shared by all of it.
            seeds: One per prompt.
            should_stop: Asked before each rollout (also a place for a progress bar).

        Returns:
            One row of metrics, or ``None`` if ``should_stop`` answered True; then nothing has changed.
        """
        if not self._contexts:
            self.prepare(prompts, seeds)
        trajectories: list[Trajectory] = []
        errors: list[dict[str, float]] = []
        for number in range(self.config.rollouts):
            # All processes stop together, or those that go on would wait for ever.
            if should_stop is not None and any(self.world.gather(should_stop())):
                return None
            names = ("rollout", self.updates, number, *([self.world.rank] if self.world.rank else []))
            guard = PolicyGuard(
                self.policy,
                self.sampler.layers,
                mode="sample",
                eligible=self.eligible,
                temperature=self.config.temperature,
                generator=stream(self.seed, *names),
                inputs=self.inputs,
            )
            report = self.judge.rollout(guard, prompts, seeds)
            errors.append({"loss": float(report.error.mean())} | {n: float(t.mean()) for n, t in report.terms.items()})
            trajectories.append(guard.trajectory)
        row = update_policy(self, trajectories, errors)
        self.calibrate()
        self.updates += 1
        if self.updates % self.config.validate_every == 0:
            self.validate()
        row |= {"step": float(self.updates), "iteration": float(self.updates), "latent_index": 0.0}
        row["best_error"] = self.best.error
        for sink in self.sinks if self.world.main else ():
            sink.write(row)
        return row

    def fit(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        updates: int,
        *,
        batch: int = 1,
        should_stop: Callable[[], bool] | None = None,
        checkpoint: Callable[[], None] | None = None,
    ) -> Iterator[MetricRow]:
        """Make updates until ``updates`` are done in all, drawing batches from a pool of prompts and seeds.

        Args:
            prompts: The pool.
            seeds: One per prompt.
            updates: Number of updates of the whole training; those of a resumed state count.
            batch: Images per rollout and process.
            should_stop: As in ``step``.
            checkpoint: Called in the main process every ``checkpoint_every`` updates, and at the end however it comes.

        Yields:
            One row of metrics per update.
        """
        wanted = batch * self.world.size
        if not 1 <= wanted <= len(prompts) or len(prompts) != len(seeds):
            raise ValueError(f"a batch of {wanted} needs as many prompts with a seed each, got {len(prompts)} prompts")
        saved = self.updates
        try:
            while self.updates < updates:
                order = torch.randperm(len(prompts), generator=stream(self.seed, "batch", self.updates)).tolist()
                mine = self.world.share(order[:wanted])
                row = self.step([prompts[i] for i in mine], [seeds[i] for i in mine], should_stop=should_stop)
                if row is None:
                    return
                if checkpoint is not None and self.world.main and self.updates % self.config.checkpoint_every == 0:
                    checkpoint()
                    saved = self.updates
                yield row
        finally:
            if checkpoint is not None and self.world.main and self.updates != saved:
                checkpoint()

    def validation_error(self, plan: Tensor) -> float:
        """Mean error of a plan ``[steps, L]`` on the validation images; each plan is sampled once."""
        key = bytes(as_choices(plan).flatten().tolist())
        if key not in self._errors:
            self._errors[key] = float(self.judge.mask_errors(plan, *self._validation).mean())
        return self._errors[key]

    def candidate(self) -> Tensor:
        """The policy's plan ``[steps, L]`` at exactly the target: a mask of full slots, or choices within the cost."""
        if not self.by_cost:
            return masks_from_policy(self.policy, self.contexts, self.full_slots, eligible=self.eligible)
        with torch.no_grad():
            logits = self.policy.logits(self.contexts)[:, self.eligible]
        table = self.costs.table[self.eligible]
        plan = torch.zeros(len(self.contexts), self.policy.layers, dtype=torch.int64)
        plan[:, self.eligible] = choices_from_logits(logits, table, self.target_cost)
        return plan

    def validate(self) -> float:
        """Compare the policy as it is with the best so far, at exactly the target's cost."""
        plan = self.candidate()
        error = self.validation_error(plan)
        if error < self.best.error:
            weights = {name: tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}
            self.best = BestPolicy(error, plan, weights)
        return error

    def best_policy(self) -> RoutingPolicy:
        """A copy of the policy with the lowest validation error so far.

        Raises:
            ValueError: Nothing was validated yet.
        """
        if not self.best.weights:
            raise ValueError("no policy was validated yet; call initialise_from_probe, fit or validate first")
        policy = copy.deepcopy(self.policy)
        policy.load_state_dict(self.best.weights)
        return policy

    def state_dict(self) -> TrainerState:
        """Everything that learning changes; ``save_checkpoint`` takes its two halves."""
        tensors = {f"policy.{name}": tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}
        tensors |= pack_optimizer(self.optimizer, self.policy)
        tensors |= {f"best.{name}": tensor.clone() for name, tensor in self.best.weights.items()}
        manifest: TrainerManifest = {
            "layers": [str(layer) for layer in self.sampler.layers],
            "policy": asdict(self.policy.config),
            "seed": self.seed,
            "updates": self.updates,
            "eligible": self.eligible.tolist(),
            "target_full": self.target_cost if self.by_cost else self.config.target_full,
            "unit": self.unit,
            "prompts": list(self._validation[0]),
            "seeds": list(self._validation[1]),
            "contexts": pack_contexts(self._contexts),
            "best_error": self.best.error if self.best.weights else None,
            "best_plan": as_choices(self.best.mask).tolist(),
            "actions": self.policy.actions,
            "baseline": [self.baseline.value, float(self.baseline.count)],
        }
        return {"tensors": tensors, "manifest": manifest}

    def load_state_dict(self, state: TrainerState) -> None:
        """Go on from ``state_dict()``; settings, the seed of what is drawn next included, are those of this trainer.

        The best candidate is kept only where it was found for the same eligible layers and target.

        Raises:
            ValueError: The state belongs to other layers, actions or another policy, whose weights do not fit.
        """
        tensors, saved, mine = state["tensors"], state["manifest"], self.state_dict()["manifest"]
        if different := unfit(saved, mine):
            raise ValueError(f"the saved weights cannot follow a changed setting ({different})")
        self.policy.load_state_dict(with_prefix(tensors, "policy."))
        self.optimizer = self._new_optimizer()
        unpack_optimizer(self.optimizer, self.policy, tensors)
        self.baseline.value, self.baseline.count = saved["baseline"][0], int(saved["baseline"][1])
        self.updates = saved["updates"]
        self._validation = (tuple(saved["prompts"]), tuple(saved["seeds"]))
        self._contexts = unpack_contexts(saved["contexts"])
        self._errors = {}
        self.unit = saved["unit"]
        self.best = BestPolicy()
        same = saved["eligible"] == mine["eligible"] and saved["target_full"] == mine["target_full"]
        if same and saved["best_error"] is not None:
            plan = torch.tensor(saved["best_plan"], dtype=torch.int64)
            self.best = BestPolicy(
                saved["best_error"], plan if self.by_cost else plan == 0, with_prefix(tensors, "best.")
            )

    def calibrate(self) -> None:
        """Shift all logits so that the expected share of full attention, or the expected cost, is the target."""
        temperature = self.config.temperature
        with torch.no_grad():
            logits = self.policy.logits(self.contexts) / temperature
        if self.by_cost:
            tilt = tilt_to_cost(logits, self.costs.table, self.target_cost, eligible=self.eligible)
            self.policy.tilt(tilt[:, :-1] * temperature)
        else:
            self.policy.shift(shift_to_share(logits, self.target_full, eligible=self.eligible) * temperature)

    def _new_optimizer(self) -> torch.optim.AdamW:
        # Decay would pull the logits towards even odds whatever the rewards say.
        return torch.optim.AdamW(self.policy.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
