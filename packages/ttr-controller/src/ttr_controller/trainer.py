"""Learns which (step, layer) slots need full attention, from whole images.

One update: K rollouts of the same prompts from the same noise, each with its own sampled masks; each rollout's reward
is compared with the mean of the others; the policy moves towards the masks that did better. After every update all
logits are shifted by one constant, so that the expected share of full attention stays at the target: what is learnt is
*where* to spend the budget, not how much of it. Candidates are compared at exactly equal cost (top-k masks of the
logits), and the best one seen on the validation images is kept, so learning never ends worse than it began.

Every random draw depends on the seed and the number of the update alone. An update that is interrupted between two
rollouts leaves nothing behind, and a resumed training goes on as if it had never stopped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from attn_dispatch.call import StepContext
from attn_dispatch.router import Backend
from torch import Tensor
from ttr_distill.grad import plain, training_mode
from ttr_distill.metrics import MetricSink
from ttr_distill.seeding import stream

from ttr_controller.budget import all_student, full_share, relative_cost, shift_to_share, slot_count
from ttr_controller.guard import PolicyGuard, masks_from_policy
from ttr_controller.judge import Judge
from ttr_controller.policy import RoutingPolicy, fit_policy_to_scores
from ttr_controller.quality.objective import QualityObjective
from ttr_controller.reinforce import bernoulli_log_prob, entropy, leave_one_out_advantage, policy_loss
from ttr_controller.reward import RewardConfig, reward
from ttr_controller.rollout import Sampler, Trajectory, decision_logits, trajectory_logits
from ttr_controller.trainer_state import (
    TrainerManifest,
    TrainerState,
    pack_contexts,
    pack_optimizer,
    unpack_contexts,
    unpack_optimizer,
    with_prefix,
)

MetricRow = dict[str, float]


@dataclass(frozen=True)
class ControllerConfig:
    """Settings of controller learning.

    Attributes:
        target_full: Wanted share of full attention among the eligible slots.
        rollouts: Rollouts K per update.
        learning_rate: Step size of AdamW.
        entropy_weight: Reward per nat of mean entropy; keeps the policy exploring.
        grad_clip_norm: Largest norm of the gradient.
        temperature: Divides the logits when sampling.
        probe_spread: Standard deviation of the logits that ``initialise_from_probe`` fits.
        validate_every: Updates between two comparisons at equal cost.
        reward: How cost enters the reward; errors there are in units of the all-student error, so that a price of 1
            is the mean slope of error against cost.
    """

    target_full: float = 0.5
    rollouts: int = 4
    learning_rate: float = 5e-4
    entropy_weight: float = 0.01
    grad_clip_norm: float = 1.0
    temperature: float = 1.0
    probe_spread: float = 2.0
    validate_every: int = 4
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        if not 0.0 < self.target_full < 1.0:
            raise ValueError(f"target_full must lie strictly between 0 and 1, got {self.target_full}")
        if self.rollouts < 2 or self.validate_every < 1:
            raise ValueError(f"rollouts must be >= 2 and validate_every >= 1, got {self}")
        if min(self.learning_rate, self.grad_clip_norm, self.temperature) <= 0.0:
            raise ValueError(f"learning_rate, grad_clip_norm and temperature must be positive, got {self}")
        if self.entropy_weight < 0.0 or self.probe_spread < 0.0:
            raise ValueError(f"entropy_weight and probe_spread must be >= 0, got {self}")


@dataclass
class BestPolicy:
    """The best candidate at equal cost so far.

    Attributes:
        error: Mean error on the validation images.
        mask: ``[steps, L]`` bool, True = full attention.
        weights: State of the policy that ranks the slots so.
    """

    error: float = math.inf
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    weights: dict[str, Tensor] = field(default_factory=dict)


class ControllerTrainer:
    """Trains a routing policy on a sampler.

    Args:
        sampler: Makes images; see ``Sampler``.
        backend: The students.
        policy: Trained in place.
        config: Settings.
        seed: Seed of every draw.
        eligible: ``[L]`` bool, layers whose student may run; ``None``: all. Others are always full and do not count.
        student_cost: ``[L]``, modelled cost of a layer's student relative to full attention; ``None``: 0.
        objective: What an image's error is; ``None``: relative RMSE of the latent.
        sinks: Get a copy of each metric row.

    Raises:
        ValueError: Policy and sampler differ in layers, or no layer is eligible.
    """

    def __init__(
        self,
        sampler: Sampler,
        backend: Backend,
        policy: RoutingPolicy,
        config: ControllerConfig | None = None,
        *,
        seed: int = 0,
        eligible: Tensor | None = None,
        student_cost: Tensor | None = None,
        objective: QualityObjective | None = None,
        sinks: Sequence[MetricSink] = (),
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
        self.student_cost = torch.zeros(layers) if student_cost is None else student_cost
        self.sinks = tuple(sinks)
        self.judge = Judge(sampler, backend, objective)
        self.best = BestPolicy()
        self.updates = 0
        self.unit = 1.0
        self._contexts: tuple[StepContext, ...] = ()
        self._validation: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
        self._errors: dict[bytes, float] = {}
        self._optimizer = self._new_optimizer()

    @property
    def contexts(self) -> tuple[StepContext, ...]:
        """Diffusion steps of the schedule that is learnt; known after ``prepare``."""
        if not self._contexts:
            raise ValueError("the sampler's steps are not known yet; call prepare(prompts, seeds) first")
        return self._contexts

    @property
    def full_slots(self) -> int:
        """Full slots among the eligible ones at the target share."""
        return slot_count(len(self.contexts), self.eligible, self.config.target_full)

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
        self._optimizer = self._new_optimizer()
        self._calibrate()
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
            if should_stop is not None and should_stop():
                return None
            generator = stream(self.seed, "rollout", self.updates, number)
            guard = PolicyGuard(
                self.policy,
                self.sampler.layers,
                mode="sample",
                eligible=self.eligible,
                temperature=self.config.temperature,
                generator=generator,
            )
            report = self.judge.rollout(guard, prompts, seeds)
            errors.append({"loss": float(report.error.mean())} | {n: float(t.mean()) for n, t in report.terms.items()})
            trajectories.append(guard.trajectory)
        row = self._update(trajectories, errors)
        self.updates += 1
        if self.updates % self.config.validate_every == 0:
            self.validate()
        row |= {"step": float(self.updates), "best_error": self.best.error}
        for sink in self.sinks:
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
    ) -> Iterator[MetricRow]:
        """Make updates until ``updates`` are done in all, drawing batches from a pool of prompts and seeds.

        Args:
            prompts: The pool.
            seeds: One per prompt.
            updates: Number of updates of the whole training; those of a resumed state count.
            batch: Images per rollout.
            should_stop: As in ``step``.

        Yields:
            One row of metrics per update.
        """
        if not 1 <= batch <= len(prompts) or len(prompts) != len(seeds):
            raise ValueError(f"a batch of {batch} needs as many prompts with a seed each, got {len(prompts)} prompts")
        while self.updates < updates:
            order = torch.randperm(len(prompts), generator=stream(self.seed, "batch", self.updates))[:batch].tolist()
            row = self.step([prompts[i] for i in order], [seeds[i] for i in order], should_stop=should_stop)
            if row is None:
                return
            yield row

    def validation_error(self, mask: Tensor) -> float:
        """Mean error of a mask ``[steps, L]`` on the validation images; each mask is sampled once."""
        key = bytes(mask.flatten().tolist())
        if key not in self._errors:
            self._errors[key] = float(self.judge.mask_errors(mask, *self._validation).mean())
        return self._errors[key]

    def validate(self) -> float:
        """Compare the policy as it is with the best so far, at exactly the target's count of full slots."""
        mask = masks_from_policy(self.policy, self.contexts, self.full_slots, eligible=self.eligible)
        error = self.validation_error(mask)
        if error < self.best.error:
            weights = {name: tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}
            self.best = BestPolicy(error, mask, weights)
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
        tensors |= pack_optimizer(self._optimizer, self.policy)
        tensors |= {f"best.{name}": tensor.clone() for name, tensor in self.best.weights.items()}
        manifest: TrainerManifest = {
            "layers": [str(layer) for layer in self.sampler.layers],
            "policy": asdict(self.policy.config),
            "seed": self.seed,
            "updates": self.updates,
            "eligible": self.eligible.tolist(),
            "target_full": self.config.target_full,
            "unit": self.unit,
            "prompts": list(self._validation[0]),
            "seeds": list(self._validation[1]),
            "contexts": pack_contexts(self._contexts),
            "best_error": self.best.error if self.best.weights else None,
            "best_mask": self.best.mask.tolist(),
        }
        return {"tensors": tensors, "manifest": manifest}

    def load_state_dict(self, state: TrainerState) -> None:
        """Go on from ``state_dict()``; settings are those of this trainer, not of the state.

        The best candidate is kept only where it was found for the same eligible layers and target.

        Raises:
            ValueError: The state belongs to other layers, another policy or another seed.
        """
        tensors, saved, mine = state["tensors"], state["manifest"], self.state_dict()["manifest"]
        theirs = (saved["layers"], saved["policy"], saved["seed"])
        if theirs != (mine["layers"], mine["policy"], mine["seed"]):
            raise ValueError(
                f"the saved training has layers, policy and seed {theirs}, "
                f"this one {(mine['layers'], mine['policy'], mine['seed'])}"
            )
        self.policy.load_state_dict(with_prefix(tensors, "policy."))
        self._optimizer = self._new_optimizer()
        unpack_optimizer(self._optimizer, self.policy, tensors)
        self.updates = saved["updates"]
        self._validation = (tuple(saved["prompts"]), tuple(saved["seeds"]))
        self._contexts = unpack_contexts(saved["contexts"])
        self._errors = {}
        self.unit = saved["unit"]
        self.best = BestPolicy()
        same = saved["eligible"] == mine["eligible"] and saved["target_full"] == mine["target_full"]
        if same and saved["best_error"] is not None:
            mask = torch.tensor(saved["best_mask"], dtype=torch.bool)
            self.best = BestPolicy(saved["best_error"], mask, with_prefix(tensors, "best."))

    def _update(self, trajectories: Sequence[Trajectory], errors: Sequence[dict[str, float]]) -> MetricRow:
        """Move the policy along the policy gradient of K rollouts, then put its expected share back on target."""
        masks = [trajectory.mask() for trajectory in trajectories]
        costs = [relative_cost(mask, self.student_cost, eligible=self.eligible) for mask in masks]
        saved = 1.0 - float(self.student_cost[self.eligible].mean())
        target = 1.0 - saved * (1.0 - self.config.target_full)
        rewards = torch.tensor(
            [
                reward(error["loss"] / self.unit, cost, target, self.config.reward)
                for error, cost in zip(errors, costs, strict=True)
            ],
            dtype=torch.float64,
        )
        advantages = leave_one_out_advantage(rewards)
        with training_mode():
            logits = [trajectory_logits(self.policy, trajectory) for trajectory in trajectories]
            log_probs = torch.stack(
                [bernoulli_log_prob(x, mask, self.eligible).sum() for x, mask in zip(logits, masks, strict=True)]
            )
            mean_entropy = torch.stack([entropy(x, self.eligible) for x in logits]).mean()
            loss = policy_loss(
                log_probs, advantages.to(log_probs), mean_entropy, entropy_weight=self.config.entropy_weight
            )
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip_norm)
            self._optimizer.step()
        expected = torch.sigmoid(torch.cat([x.detach() for x in logits])[:, self.eligible]).mean()
        self._calibrate()
        shares = [full_share(mask, eligible=self.eligible) for mask in masks]
        return {name: sum(error[name] for error in errors) / len(errors) for name in errors[0]} | {
            "reward": float(rewards.mean()),
            "reward_spread": float(rewards.std()),
            "policy_loss": float(loss.detach()),
            "entropy": float(mean_entropy.detach()),
            "grad_norm": float(norm),
            "actual_full_attn_ratio": sum(shares) / len(shares),
            "expected_full_attn_ratio": float(expected),
            "target_full_attn_ratio": self.config.target_full,
            "lambda_eff": self.config.reward.lambda_eff,
        }

    def _calibrate(self) -> None:
        """Shift all logits by one constant so that the expected share of full attention is the target."""
        with torch.no_grad():
            logits = decision_logits(self.policy.logits(self.contexts), 0.5, self.config.temperature)
        shift = shift_to_share(logits, self.config.target_full, eligible=self.eligible)
        self.policy.shift(shift * self.config.temperature)

    def _new_optimizer(self) -> torch.optim.AdamW:
        # Decay would pull the logits towards even odds whatever the rewards say.
        return torch.optim.AdamW(self.policy.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
