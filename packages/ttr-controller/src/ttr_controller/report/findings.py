"""What the data say, computed from them: comparisons at equal cost, fidelity by variant, break-even points.

Everything here is a value; ``sentences`` puts it into words and ``plots`` into pictures.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Literal

from ttr_controller.report.results import Fidelity, Pareto, ParetoPoint, Timing, TimingRow

READY = 0.005
"""Mean cosine distance up to which a student may serve under any routing."""
PARTLY_READY = 0.012
"""Cosine distance up to which a student may serve in at most three quarters of the slots."""
SIMPLE_METHODS = ("random", "first steps full", "last steps full", "distillation error by layer", "budget")
"""Ways to route without learning and without sampling a student."""
POLICY, PROBE, ALL_FULL, ALL_STUDENT, EXACT = "policy", "probe", "all full", "all student", "exact"
SAME_COST = 0.005
"""Costs closer than this are called equal."""

Kind = Literal["attention", "step"]


@dataclass(frozen=True)
class Reading:
    """Latent error of one method at one cost; ``interpolated`` between two measured costs if so marked."""

    method: str
    error: float
    standard_error: float | None = None
    interpolated: bool = False
    by_prompt: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The policy and the other methods at the policy's cost."""

    cost: float
    full_share: float | None
    policy: Reading
    others: tuple[Reading, ...]

    def reading(self, method: str) -> Reading | None:
        """The reading of a method, if it can be had at this cost."""
        return next((reading for reading in (self.policy, *self.others) if reading.method == method), None)

    @property
    def best_simple(self) -> Reading | None:
        """The simple baseline with the lowest error."""
        simple = [reading for reading in self.others if reading.method in SIMPLE_METHODS]
        return min(simple, key=lambda reading: reading.error, default=None)

    def excess(self, other: Reading) -> float:
        """How far the policy's error lies above another's, relative to it; negative = the policy is better."""
        return self.policy.error / other.error - 1 if other.error > 0 else math.inf * (self.policy.error > 0)

    def within_error(self, other: Reading) -> bool:
        """Whether the difference is no larger than its standard error.

        Where both were measured prompt by prompt, that is the error of the mean of the paired differences; otherwise
        the errors of the two means are joined, which is larger where prompts differ more than methods.
        """
        pairs = list(zip(self.policy.by_prompt, other.by_prompt, strict=False))
        differences = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
        if len(differences) > 1 and len(self.policy.by_prompt) == len(other.by_prompt) == len(differences):
            spread = statistics.stdev(differences) / math.sqrt(len(differences))
        else:
            spread = math.hypot(self.policy.standard_error or 0.0, other.standard_error or 0.0)
        return abs(self.policy.error - other.error) <= spread

    @property
    def worse(self) -> bool:
        """Whether the policy's error is above the best simple baseline's."""
        return self.best_simple is not None and self.policy.error > self.best_simple.error


def points_of(pareto: Pareto, method: str) -> list[ParetoPoint]:
    """The measured points of a method with a latent error, by rising cost."""
    chosen = [point for point in pareto.points if point.method == method and point.latent_rmse is not None]
    return sorted(chosen, key=lambda point: point.cost)


def curve_of(pareto: Pareto, method: str) -> list[ParetoPoint]:
    """A method's points with the end points that all methods share, by rising cost."""
    ends = [*points_of(pareto, ALL_STUDENT), *points_of(pareto, ALL_FULL)]
    own = [] if method in (ALL_STUDENT, ALL_FULL) else points_of(pareto, method)
    free = [end for end in ends if all(abs(end.cost - point.cost) > SAME_COST for point in own)]
    return sorted([*own, *free], key=lambda point: point.cost)


def methods_of(pareto: Pareto) -> list[str]:
    """Names of the methods in the order of their first point."""
    return list(dict.fromkeys(point.method for point in pareto.points))


def compare_policy(pareto: Pareto) -> list[Comparison]:
    """Compare the policy with every other method at each cost the policy was measured at.

    Costs at which every method is the same (students everywhere, full attention everywhere) are left out.
    """
    ends = [point.cost for point in pareto.points if point.method in (ALL_FULL, ALL_STUDENT)]
    comparisons = []
    for point in points_of(pareto, POLICY):
        if any(abs(point.cost - end) <= SAME_COST for end in ends) or point.latent_rmse is None:
            continue
        others = [
            _read(pareto, method, point.cost)
            for method in methods_of(pareto)
            if method not in (POLICY, ALL_FULL, ALL_STUDENT)
        ]
        policy = Reading(POLICY, point.latent_rmse, point.latent_rmse_se, by_prompt=point.latent_rmse_by_prompt)
        found = tuple(reading for reading in others if reading is not None)
        comparisons.append(Comparison(point.cost, point.full_share, policy, found))
    return comparisons


def _read(pareto: Pareto, method: str, cost: float) -> Reading | None:
    curve = curve_of(pareto, method)
    nearest = min(curve, key=lambda point: abs(point.cost - cost), default=None)
    if nearest is None:
        return None
    if abs(nearest.cost - cost) <= SAME_COST and nearest.latent_rmse is not None:
        return Reading(method, nearest.latent_rmse, nearest.latent_rmse_se, by_prompt=nearest.latent_rmse_by_prompt)
    for low, high in itertools.pairwise(curve):
        if low.cost < cost < high.cost and low.latent_rmse is not None and high.latent_rmse is not None:
            weight = (cost - low.cost) / (high.cost - low.cost)
            return Reading(method, (1 - weight) * low.latent_rmse + weight * high.latent_rmse, None, interpolated=True)
    return None


@dataclass(frozen=True)
class FidelitySeries:
    """One variant of the student over all layers, before or after training."""

    variant: str
    when: str
    mean: float
    mean_l2: float | None
    worst_layer: str
    worst: float
    layers: int
    ready: int
    partly_ready: int


def variants_of_fidelity(fidelity: Fidelity) -> list[tuple[str, str]]:
    """The (variant, when) pairs: variants in the order of the file, before training before after it."""
    names = list(dict.fromkeys(row.variant for row in fidelity.rows))
    pairs = {(row.variant, row.when) for row in fidelity.rows}
    return [(name, when) for name in names for when in ("before", "after") if (name, when) in pairs]


def fidelity_series(fidelity: Fidelity) -> list[FidelitySeries]:
    """Sum up the rows of each (variant, when), in the order of ``variants_of_fidelity``."""
    series = []
    for variant, when in variants_of_fidelity(fidelity):
        rows = [row for row in fidelity.rows if (row.variant, row.when) == (variant, when)]
        known = {row.layer: row.cosine_distance for row in rows if row.cosine_distance is not None}
        if not known:
            continue
        l2 = [row.relative_l2 for row in rows if row.relative_l2 is not None]
        worst_layer = max(known, key=lambda layer: known[layer])
        series.append(
            FidelitySeries(
                variant=variant,
                when=when,
                mean=sum(known.values()) / len(known),
                mean_l2=sum(l2) / len(l2) if l2 else None,
                worst_layer=worst_layer,
                worst=known[worst_layer],
                layers=len(known),
                ready=sum(value <= READY for value in known.values()),
                partly_ready=sum(value <= PARTLY_READY for value in known.values()),
            )
        )
    return series


def preset_series(fidelity: Fidelity, preset: str) -> FidelitySeries | None:
    """The series of the run's own preset, after training where it was measured then."""
    own = [item for item in fidelity_series(fidelity) if item.variant == preset]
    return next((item for item in own if item.when == "after"), own[0] if own else None)


@dataclass(frozen=True)
class Payoff:
    """From how many tokens a variant is faster than exact attention on this machine.

    Attributes:
        variant: The variant.
        kind: What was timed.
        verdict: ``"never"``: slower at every measured size; ``"always"``: faster at every one; ``"from"``: faster from
            ``tokens`` on; ``"mixed"``: faster at ``faster`` only; ``"unknown"``: not measured beside exact attention.
        tokens: Break-even point between two measured sizes, with ``"from"``.
        faster: Measured sizes at which the variant is faster.
        sizes: Measured sizes.
        largest_ratio: Exact time over the variant's time at the largest size; above 1 = faster.
    """

    variant: str
    kind: Kind
    verdict: Literal["never", "always", "from", "mixed", "unknown"]
    tokens: float | None = None
    faster: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    largest_ratio: float | None = None


def milliseconds(row: TimingRow, kind: Kind) -> float | None:
    """The time of a row."""
    return row.attention_ms if kind == "attention" else row.step_ms


def times_of(timing: Timing, variant: str, kind: Kind) -> dict[int, float]:
    """Milliseconds of a variant by number of tokens, rising."""
    pairs = ((row.tokens, milliseconds(row, kind)) for row in timing.rows if row.variant == variant)
    return {tokens: time for tokens, time in sorted(pairs, key=lambda pair: pair[0]) if time is not None and time > 0}


def variants_of(timing: Timing) -> list[str]:
    """Names of the timed variants but exact attention."""
    return [name for name in dict.fromkeys(row.variant for row in timing.rows) if name != EXACT]


def payoff(timing: Timing, variant: str, kind: Kind) -> Payoff:
    """Decide from the measured times, not from the recorded break-even point, whether and where a variant pays.

    The recorded point is taken where it lies between the two sizes at which the order changes; otherwise the point is
    interpolated on logarithmic axes.
    """
    exact, own = times_of(timing, EXACT, kind), times_of(timing, variant, kind)
    sizes = [tokens for tokens in own if tokens in exact]
    if not sizes:
        return Payoff(variant, kind, "unknown")
    ratios = {tokens: exact[tokens] / own[tokens] for tokens in sizes}
    faster = tuple(tokens for tokens in sizes if ratios[tokens] > 1)
    last = ratios[sizes[-1]]
    if not faster:
        return Payoff(variant, kind, "never", None, faster, tuple(sizes), last)
    if len(faster) == len(sizes):
        return Payoff(variant, kind, "always", None, faster, tuple(sizes), last)
    first = sizes.index(faster[0])
    if faster != tuple(sizes[first:]):
        return Payoff(variant, kind, "mixed", None, faster, tuple(sizes), last)
    low, high = sizes[first - 1], sizes[first]
    recorded = timing.break_even.get(variant)
    given = None if recorded is None else getattr(recorded, f"{kind}_tokens")
    share = math.log(ratios[low]) / (math.log(ratios[low]) - math.log(ratios[high]))
    between = low * (high / low) ** share
    tokens = given if given is not None and low <= given <= high else between
    return Payoff(variant, kind, "from", tokens, faster, tuple(sizes), last)
