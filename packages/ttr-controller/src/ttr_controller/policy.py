"""The routing policy: which layers need full attention in a diffusion step.

A small net reads noise level, guidance and image size and answers one logit per layer; a high logit asks for full
attention. Prompts are no input: what a layer's student breaks depends far more on layer and step than on the subject.

Scalars enter as sines and cosines at frequencies from 1 down to 1e-4 (Vaswani et al. 2017, section 3.5). For these to
tell inputs apart without aliasing, an input should span tens of radians at the highest frequency; the scales in
``PolicyConfig`` see to that. Checkpoints of the reference node pack were trained without scales: load them with
``PolicyConfig.legacy``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from attn_dispatch.call import StepContext
from torch import Tensor, nn
from ttr_distill.embeddings import ScalarSinusoidalEmbedding
from ttr_distill.grad import plain, training_mode

from ttr_controller.budget import logits_for_scores


@dataclass(frozen=True)
class PolicyConfig:
    """Size of the policy and units of its inputs.

    Attributes:
        embed_dim: Width of each scalar's embedding; even.
        hidden_dim: Width of the hidden layers.
        sigma_scale: Multiplies sigma (0 to 1 for Flux) before embedding.
        cfg_scale: Multiplies the guidance scale before embedding.
        size_scale: Multiplies width and height in image pixels before embedding.
        pixels_per_latent: Image pixels per latent pixel; turns ``StepContext.latent_size`` into pixels.
    """

    embed_dim: int = 64
    hidden_dim: int = 256
    sigma_scale: float = 100.0
    cfg_scale: float = 1.0
    size_scale: float = 1.0 / 16.0
    pixels_per_latent: float = 8.0

    def __post_init__(self) -> None:
        if self.embed_dim < 4 or self.embed_dim % 2 or self.hidden_dim < 1:
            raise ValueError(f"embed_dim must be even and >= 4, hidden_dim >= 1, got {self}")
        scales = (self.sigma_scale, self.cfg_scale, self.size_scale, self.pixels_per_latent)
        if not all(math.isfinite(scale) and scale > 0.0 for scale in scales):
            raise ValueError(f"input scales must be finite and positive, got {self}")

    @classmethod
    def legacy(cls, embed_dim: int = 64, hidden_dim: int = 256) -> PolicyConfig:
        """Unscaled inputs, as in ``flux2_ttr_controller_v1`` checkpoints."""
        return cls(embed_dim, hidden_dim, sigma_scale=1.0, cfg_scale=1.0, size_scale=1.0)


class ResolutionEmbedding(nn.Module):
    """Embedding of width and height.

    Args:
        embed_dim: Width of each side's sinusoidal embedding and of the result.
        scale: Multiplies both sides before embedding.
    """

    def __init__(self, embed_dim: int, scale: float) -> None:
        super().__init__()
        self.side_embed = ScalarSinusoidalEmbedding(embed_dim, input_scale=scale)
        self.proj = nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))

    def forward(self, width: Tensor, height: Tensor) -> Tensor:
        """Embed widths and heights ``[n]`` in image pixels to ``[n, embed_dim]``."""
        embedded: Tensor = self.proj(torch.cat([self.side_embed(width), self.side_embed(height)], dim=-1))
        return embedded


class RoutingPolicy(nn.Module):
    """Net from a diffusion step to one logit per layer; high = full attention.

    State names and sizes are those of ``flux2_ttr_controller_v1``: ``resolution_embed.proj.{0,2}.*`` and
    ``mlp.{0,2,4}.*``. It is tiny and meant to stay on the CPU, where reading its answer waits for no device.

    Args:
        layers: Number of layers.
        config: Sizes and input scales.
        seed: Seed of the initial weights; ``None`` draws from torch's global generator.

    Raises:
        ValueError: ``layers`` is not positive.
    """

    def __init__(self, layers: int, config: PolicyConfig | None = None, *, seed: int | None = None) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a policy needs at least one layer, got {layers}")
        self.layers = layers
        self.config = config or PolicyConfig()
        width, hidden = self.config.embed_dim, self.config.hidden_dim
        # Made in inference mode, the weights could never be trained.
        with training_mode(), torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.sigma_embed = ScalarSinusoidalEmbedding(width, input_scale=self.config.sigma_scale)
            self.cfg_embed = ScalarSinusoidalEmbedding(width, input_scale=self.config.cfg_scale)
            self.resolution_embed = ResolutionEmbedding(width, self.config.size_scale)
            self.mlp = nn.Sequential(
                nn.Linear(3 * width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, layers)
            )

    def forward(self, step: StepContext) -> Tensor:
        """Answer one step with logits ``[L]`` float32."""
        return self.logits([step])[0]

    def logits(self, steps: Sequence[StepContext]) -> Tensor:
        """Answer several steps with logits ``[steps, L]`` float32.

        Raises:
            ValueError: No step was given.
        """
        if not steps:
            raise ValueError("no diffusion step given")
        pixels = self.config.pixels_per_latent
        rows = [
            (step.sigma, step.cfg_scale, step.latent_size[1] * pixels, step.latent_size[0] * pixels) for step in steps
        ]
        inputs = torch.tensor(rows, dtype=torch.float32, device=next(self.parameters()).device)
        sigma, cfg, width, height = inputs.unbind(dim=1)
        features = [self.sigma_embed(sigma), self.cfg_embed(cfg), self.resolution_embed(width, height)]
        answer: Tensor = self.mlp(torch.cat(features, dim=-1))
        return answer.float()

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add a constant to every logit: more (positive) or less full attention everywhere, ranking unchanged."""
        self.get_parameter("mlp.4.bias").add_(amount)


def fit_policy_to_scores(
    policy: RoutingPolicy,
    contexts: Sequence[StepContext],
    scores: Tensor,
    *,
    spread: float = 2.0,
    eligible: Tensor | None = None,
    updates: int = 400,
    learning_rate: float = 3e-3,
) -> float:
    """Teach a policy the ranking of scores, by least squares on logits (Adam with cosine decay).

    Args:
        policy: Trained in place.
        contexts: The steps, in the order of the rows of ``scores``.
        scores: ``[steps, L]``, high = needs full attention; ``logits_for_scores`` turns them into logits.
        spread: Standard deviation of these logits.
        eligible: ``[L]`` bool; other layers are not fitted. ``None``: all.
        updates: Number of updates.
        learning_rate: Step size at the start.

    Returns:
        Root mean square distance of the logits that is left.

    Raises:
        ValueError: ``scores`` does not fit contexts and layers.
    """
    if scores.shape != (len(contexts), policy.layers):
        raise ValueError(f"scores must be [{len(contexts)}, {policy.layers}], got {tuple(scores.shape)}")
    with training_mode():
        wanted = logits_for_scores(plain(scores, dtype=torch.float32), spread=spread, eligible=eligible)
        weight = torch.ones(policy.layers) if eligible is None else plain(eligible, dtype=torch.float32)
        total = weight.sum() * len(contexts)
        optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            loss = ((policy.logits(contexts) - wanted).square() * weight).sum() / total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            left = ((policy.logits(contexts) - wanted).square() * weight).sum() / total
    return float(left.sqrt())
