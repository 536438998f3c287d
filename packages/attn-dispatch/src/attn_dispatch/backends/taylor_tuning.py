"""Search for the norm power, norm clip and score factor under which the series is nearest to attention."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch
from attn_kernels import Partial
from torch import Tensor

from attn_dispatch.backends.quality import exact_rows, sample_queries
from attn_dispatch.backends.taylor_config import TaylorBackendConfig
from attn_dispatch.call import AttentionCall, LayerKey

logger = logging.getLogger(__name__)

BAD_DENOMINATOR_PENALTY = 10.0
"""Added to a score if every denominator is bad."""

Attend = Callable[[AttentionCall, TaylorBackendConfig], Partial]
"""Answers a call under given options: ``out`` ``[B, H, Nq, Dv]`` and ``lse`` ``[B, H or more, Nq]``."""


@dataclass(frozen=True)
class TuningChoice:
    """What a layer uses.

    Attributes:
        power: Norm power.
        clip: Norm clip.
        scale_mul: Score factor.
        score: Mean absolute distance from attention in the last search, plus the penalty for bad denominators.
        start_score: That of the settings in use before that search, on the same queries and keys.
        searches: In how many steps the layer was searched.
    """

    power: float
    clip: float
    scale_mul: float
    score: float
    start_score: float
    searches: int


class TaylorTuner:
    """Tunes every layer that calls in the first steps of a run, each for itself.

    In one step all layers judge the same candidates: the settings that the layer uses, and draws of
    ``Random(auto_tune_seed + step)``. Candidates are judged by the same queries and keys against exact attention with
    unchanged queries and keys. The best one counts from that call on. Scores are read from the device once a search.

    Args:
        config: Options of the backend.

    Attributes:
        choices: What each searched layer uses in this run; the key ``None`` stands for layers without a name.
    """

    def __init__(self, config: TaylorBackendConfig) -> None:
        self.config = config
        self.choices: dict[LayerKey | None, TuningChoice] = {}
        self._generator = torch.Generator()
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the last run."""
        self.choices.clear()
        self._sigmas: list[float | None] = []
        self._searched: set[LayerKey | None] = set()
        self._generator.manual_seed(self.config.auto_tune_seed)

    def end_run(self) -> None:
        """Report what was chosen, in one line of log."""
        if self.choices:
            logger.info("%s", self.summary())

    def summary(self) -> str:
        """Say what each layer uses."""
        parts = (
            f"{'unnamed' if layer is None else layer}: power={choice.power:.3g} clip={choice.clip:.3g} "
            f"scale_mul={choice.scale_mul:.3g} score {choice.start_score:.4g} -> {choice.score:.4g}"
            for layer, choice in self.choices.items()
        )
        return f"Taylor auto-tune, {len(self.choices)} layers: " + "; ".join(parts)

    def config_for(self, call: AttentionCall, attend: Attend) -> TaylorBackendConfig:
        """Return the options for a call, after a search where one is due.

        Args:
            call: The call.
            attend: Answers a smaller call under given options.
        """
        config = self.config
        if not config.auto_tune or config.qk_normalize or config.auto_tune_steps == 0:
            return config
        sigma = None if call.step is None else call.step.sigma
        if not config.qk_norm.open_at(sigma):
            return config
        if not self._sigmas or self._sigmas[-1] != sigma:
            if len(self._sigmas) <= config.auto_tune_steps:
                self._sigmas.append(sigma)
            self._searched.clear()
        if len(self._sigmas) <= config.auto_tune_steps and call.layer not in self._searched:
            self._searched.add(call.layer)
            self._search(call, attend)
        return self.current(call)

    def current(self, call: AttentionCall) -> TaylorBackendConfig:
        """Return the options for a call as they are, without a search."""
        choice = self.choices.get(call.layer)
        sigma = None if call.step is None else call.step.sigma
        if choice is None or not self.config.qk_norm.open_at(sigma):
            return self.config
        return self.config.tuned(choice.power, choice.clip, choice.scale_mul)

    def candidates(self, step: int) -> list[tuple[float, float, float]]:
        """Draw the settings ``(power, clip, scale_mul)`` of a step, counted from 0."""
        config, random = self.config, Random(self.config.auto_tune_seed + step)
        return [
            (
                random.uniform(config.auto_tune_qk_norm_power_min, config.auto_tune_qk_norm_power_max),
                random.uniform(config.auto_tune_qk_norm_clip_min, config.auto_tune_qk_norm_clip_max),
                random.uniform(config.auto_tune_scale_mul_min, config.auto_tune_scale_mul_max),
            )
            for _ in range(config.auto_tune_candidates)
        ]

    def _search(self, call: AttentionCall, attend: Attend) -> None:
        current, before = self.current(call), self.choices.get(call.layer)
        in_use = (current.qk_norm_power, current.qk_norm_clip, current.scale_mul)
        settings = [in_use, *self.candidates(len(self._sigmas) - 1)]
        small = _thin(call, self.config.auto_tune_max_tokens)
        places = sample_queries(self.config.auto_tune_quality_samples, small.q.shape[2], self._generator)
        index = places.to(call.q.device, non_blocking=True)
        exact = exact_rows(small, index).float()
        scores = torch.stack([_score(attend(small, self.config.tuned(*one)), exact, index) for one in settings])
        values: list[float] = scores.tolist()
        best = min(range(len(values)), key=values.__getitem__)
        searches = 1 if before is None else before.searches + 1
        self.choices[call.layer] = TuningChoice(*settings[best], values[best], values[0], searches)


def _thin(call: AttentionCall, tokens: int) -> AttentionCall:
    """Keep at most ``tokens`` queries and keys, spread evenly so that text and image both count; 0 = all."""

    def places(total: int) -> Tensor | None:
        if tokens == 0 or total <= tokens:
            return None
        return torch.arange(tokens, device=call.q.device) * total // tokens

    queries, keys = places(call.q.shape[2]), places(call.k.shape[2])
    if queries is not None:
        call = replace(call, q=call.q.index_select(2, queries))
    if keys is not None:
        mask = None if call.key_mask is None else call.key_mask.index_select(1, keys)
        call = replace(call, k=call.k.index_select(2, keys), v=call.v.index_select(2, keys), key_mask=mask)
    return replace(call, layout=None)


def _score(partial: Partial, exact: Tensor, index: Tensor) -> Tensor:
    """Mean distance over the sampled queries, and the penalty for bad denominators; lower is better, 0-d."""
    error = (partial.out.index_select(2, index).float() - exact).abs()
    bad = error.isnan()
    mean = error.masked_fill(bad, 0).sum() / (~bad).sum().clamp(min=1)
    return mean + BAD_DENOMINATOR_PENALTY * partial.lse.isnan().float().mean()
