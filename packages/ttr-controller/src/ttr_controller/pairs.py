"""How student slots add up in pairs: a model of the final error that ranks slots with what they do to one another.

Errors of several slots do not just add as squares: two slots may push the final latent the same way, or one may undo
the other. To first order the final deviation from the teacher is a sum of vectors, one for each slot that is changed
against some centre mask; its squared length needs only their scalar products (a Gram matrix, as in Gauss-Newton). They
are measured by changing one slot at a time, and sampling on from there. The best mask of any size under the model is
then found by exchanging slots, without another rollout.

The centre lies in the middle of what is aimed at, not at exact sampling: errors grow differently along a trajectory
that is already disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from attn_dispatch.router import AttentionRouter, Backend, Route
from torch import Tensor

from ttr_controller.guard import ScheduleGuard
from ttr_controller.probe import OnEvaluation
from ttr_controller.rollout import SamplerPath, VelocityModel


@dataclass(frozen=True, eq=False)
class PairErrors:
    """A quadratic model of the final error around a mask.

    Attributes:
        centre: ``[steps, L]`` bool, the mask that was measured around; True = full attention.
        slots: ``[K]`` int64, flat numbers of the slots that may change.
        products: ``[B, K + 1, K + 1]`` float64, for each image the scalar products of the centre's deviation from the
            teacher (index 0) and of what each slot's change adds to it, relative to the teacher's squared norm.
    """

    centre: Tensor
    slots: Tensor
    products: Tensor

    def predict(self, mask: Tensor) -> Tensor:
        """Relative error ``[B]`` of the final latent that the model expects of a mask ``[steps, L]``."""
        changed = (mask.flatten() != self.centre.flatten())[self.slots]
        return self._squared(changed.double()).sqrt()

    def alone(self) -> Tensor:
        """What each slot's change adds by itself, ``[steps, L]`` float32, root mean square over the images.

        Measured around exact sampling, that is what ``flip_scores`` with ``every=1`` measures.
        """
        scores = torch.zeros(self.centre.numel())
        scores[self.slots] = self.products.diagonal(dim1=1, dim2=2)[:, 1:].mean(dim=0).sqrt().float()
        return scores.view(self.centre.shape)

    def best_mask(self, count: int, *, keep: Tensor | None = None, within: Tensor | None = None) -> Tensor:
        """The mask with the least expected error, mean over the images, that exchanging single slots can find.

        Args:
            count: Full slots among those that may change.
            keep: ``[steps, L]`` bool, slots that have to be full. ``None``: any.
            within: ``[steps, L]`` bool, slots that may be full. ``None``: all.

        Returns:
            ``[steps, L]`` bool.

        Raises:
            ValueError: ``count`` does not fit.
        """
        centre = self.centre.flatten()[self.slots]
        least = torch.zeros_like(centre) if keep is None else keep.flatten()[self.slots]
        most = torch.ones_like(centre) if within is None else within.flatten()[self.slots]
        if not int(least.sum()) <= count <= int(most.sum()):
            raise ValueError(f"count must lie between {int(least.sum())} and {int(most.sum())}, got {count}")
        free = most & ~least
        full = (centre & most) | least
        while (missing := count - int(full.sum())) != 0:
            errors = self._after_one(full != centre)
            errors[~free | (full if missing > 0 else ~full)] = torch.inf
            full[int(errors.argmin())] = missing > 0
        while self._exchange(full, centre, free):
            pass
        mask = self.centre.flatten().clone()
        mask[self.slots] = full
        return mask.view(self.centre.shape)

    def scores(self, counts: Sequence[int]) -> Tensor:
        """Rank slots so that the best masks of several sizes lie within one another.

        Args:
            counts: Full slots among those that may change; the first is met best, the others go out from there.

        Returns:
            ``[steps, L]`` float32, high = needs full attention; 0 where a slot may not change.
        """
        first, *others = counts
        masks = {first: self.best_mask(first)}
        for count in sorted(c for c in others if c > first):
            masks[count] = self.best_mask(count, keep=masks[max(masks)])
        for count in sorted((c for c in others if c < first), reverse=True):
            masks[count] = self.best_mask(count, within=masks[min(masks)])
        known = [masks[count].flatten()[self.slots] for count in sorted(masks)]
        centre = self.centre.flatten()[self.slots]
        full, order = torch.zeros_like(centre), []
        for limit in [*known, torch.ones_like(centre)]:
            while bool((limit & ~full).any()):
                errors = self._after_one(full != centre)
                errors[~limit | full] = torch.inf
                order.append(int(errors.argmin()))
                full[order[-1]] = True
        scores = torch.zeros(self.centre.numel())
        scores[self.slots[order]] = torch.arange(len(order), 0, -1, dtype=torch.float32) / len(order)
        return scores.view(self.centre.shape)

    def _squared(self, changed: Tensor) -> Tensor:
        """Squared error ``[B]`` after changes ``[K]`` of 0 or 1."""
        weights = torch.cat([torch.ones(1, dtype=torch.float64), changed])
        return ((self.products @ weights) @ weights).clamp_min(0.0)

    def _terms(self, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error ``[B, 1]``, what one more change of each slot adds ``[B, K]``, and the signs of changes."""
        signs = 1.0 - 2.0 * changed.double()
        weights = torch.cat([torch.ones(1, dtype=torch.float64), changed.double()])
        slope = (self.products @ weights)[:, 1:]
        alone = self.products.diagonal(dim1=1, dim2=2)[:, 1:]
        return self._squared(changed.double())[:, None], 2.0 * signs * slope + alone, signs

    def _after_one(self, changed: Tensor) -> Tensor:
        """Mean error ``[K]`` after changing one more slot."""
        now, added, _ = self._terms(changed)
        return (now + added).clamp_min(0.0).sqrt().mean(dim=0)

    def _exchange(self, full: Tensor, centre: Tensor, free: Tensor) -> bool:
        """Make the best exchange of a full slot for another one in ``full``; answer whether there was one."""
        now, added, signs = self._terms(full != centre)
        both = 2.0 * signs[:, None] * signs * self.products[:, 1:, 1:]
        pairs = now[:, :, None] + added[:, :, None] + added[:, None, :] + both
        errors = pairs.clamp_min(0.0).sqrt().mean(dim=0)
        errors[~((full & free)[:, None] & (~full & free))] = torch.inf
        best = int(errors.argmin())
        leaves, enters = divmod(best, full.shape[0])
        if not float(errors[leaves, enters]) < float(now.sqrt().mean()) - 1e-9:
            return False
        full[leaves], full[enters] = False, True
        return True


@torch.no_grad()
def measure_pairs(
    model: VelocityModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    backend: Backend,
    centre: Tensor,
    *,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> PairErrors:
    """Measure what changing each slot of a mask adds to the final latent's deviation from the teacher.

    Args:
        model: Sampler whose single steps can be asked for.
        prompts: One per image.
        seeds: One per image.
        backend: The students.
        centre: ``[steps, L]`` bool, the mask to measure around.
        eligible: ``[L]`` bool; other layers are full and stay so. ``None``: all layers.
        path: The exact trajectory of these prompts and seeds where the caller has it; else it is sampled here.
        on_evaluation: Called once per model evaluation of the batch, ``pair_evaluations`` times in all.

    Raises:
        ValueError: ``centre`` does not fit the model, or no layer is eligible.
    """
    path = path or model.trajectory(prompts, seeds)
    steps, count = path.sigmas.shape[0] - 1, len(model.layers)
    allowed = torch.ones(count, dtype=torch.bool) if eligible is None else eligible.bool().cpu()
    if centre.shape != (steps, count) or allowed.shape != (count,) or not bool(allowed.any()):
        raise ValueError(
            f"centre must be [{steps}, {count}] and a layer eligible, got {tuple(centre.shape)}, {allowed}"
        )
    centre = centre.cpu() | ~allowed
    exact = path.latents[-1].float().flatten(1)
    scale = torch.linalg.vector_norm(exact, dim=1, keepdim=True)

    def run(latent: Tensor, start: int, rows: Tensor) -> list[Tensor]:
        """States from step ``start`` on; ``rows`` ``[steps - start, L]``."""
        states = [latent]
        for step, row in enumerate(rows, start=start):
            router = AttentionRouter((Route(backend, (ScheduleGuard(row[None], model.layers),)),))
            velocity = model.velocity(states[-1], step, prompts, router)
            states.append(states[-1] + (path.sigmas[step + 1] - path.sigmas[step]).to(velocity) * velocity)
            if on_evaluation is not None:
                on_evaluation()
        return states

    states = run(path.latents[0], 0, centre)
    base = (states[-1].float().flatten(1) - exact) / scale
    slots = torch.nonzero(allowed.expand(steps, count).flatten()).squeeze(1)
    vectors = [base]
    for slot in slots.tolist():
        step, layer = divmod(slot, count)
        rows = centre[step:].clone()
        rows[0, layer] = ~rows[0, layer]
        vectors.append((run(states[step], step, rows)[-1].float().flatten(1) - exact) / scale - base)
    stacked = torch.stack(vectors, dim=1)  # [B, K + 1, values]
    return PairErrors(centre, slots, (stacked @ stacked.transpose(1, 2)).double().cpu())


def pair_evaluations(steps: int, layers: int) -> int:
    """Model evaluations of ``measure_pairs`` with ``layers`` eligible layers; a rollout takes ``steps`` of them."""
    return steps + layers * steps * (steps + 1) // 2
