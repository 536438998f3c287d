"""The routing policy: which layers need full attention in a diffusion step.

A small net reads noise level, guidance and image size and answers one logit per layer; a high logit asks for full
attention. With several alternatives to full attention it answers one logit per layer and attention, that of the last
alternative fixed at 0. What a layer's student breaks depends far more on layer and step than on the subject; the
prompt's pooled text embedding and the errors measured in the step before are further inputs for those who want them.

Scalars enter as sines and cosines at frequencies from 1 down to 1e-4 (Vaswani et al. 2017, section 3.5). For these to
tell inputs apart without aliasing, an input should span tens of radians at the highest frequency; the scales in
``PolicyConfig`` see to that. Checkpoints of the reference node pack were trained without scales: load them with
``PolicyConfig.legacy``.

Names of the state, as in ``flux2_ttr_controller_v1``: ``resolution_embed.proj.{0,2}`` embed width and height,
``mlp.{0,2,4}`` are the net; ``mlp.0`` reads the embeddings of sigma, guidance and resolution in this order.
``text_embed`` and ``error_embed`` exist only where the config asks for these inputs; what they answer is added to what
``mlp.0`` answers, so that the names and sizes of the rest stay.
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
from ttr_controller.inputs import StepInputs


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
        text_width: Width of the pooled text embedding that the policy reads; 0 = none.
        previous_error: Whether the policy reads each layer's measured error in the step before.
    """

    embed_dim: int = 64
    hidden_dim: int = 256
    sigma_scale: float = 100.0
    cfg_scale: float = 1.0
    size_scale: float = 1.0 / 16.0
    pixels_per_latent: float = 8.0
    text_width: int = 0
    previous_error: bool = False

    def __post_init__(self) -> None:
        if self.embed_dim < 4 or self.embed_dim % 2 or self.hidden_dim < 1:
            raise ValueError(f"embed_dim must be even and >= 4, hidden_dim >= 1, got {self}")
        scales = (self.sigma_scale, self.cfg_scale, self.size_scale, self.pixels_per_latent)
        if not all(math.isfinite(scale) and scale > 0.0 for scale in scales):
            raise ValueError(f"input scales must be finite and positive, got {self}")
        if self.text_width < 0:
            raise ValueError(f"text_width must be >= 0, got {self.text_width}")

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

    It is tiny and meant to stay on the CPU, where reading its answer waits for no device.

    Args:
        layers: Number of layers.
        config: Sizes and input scales.
        seed: Seed of the initial weights; ``None`` draws from torch's global generator.
        actions: Attentions that a layer chooses among: full and ``actions - 1`` alternatives.

    Raises:
        ValueError: ``layers`` is not positive, or there is nothing to choose.
    """

    def __init__(
        self, layers: int, config: PolicyConfig | None = None, *, seed: int | None = None, actions: int = 2
    ) -> None:
        super().__init__()
        if layers < 1 or actions < 2:
            raise ValueError(f"a policy needs at least one layer and two actions, got {layers} and {actions}")
        self.layers = layers
        self.actions = actions
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
                nn.Linear(3 * width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, layers * (actions - 1)),
            )
            if self.config.text_width:
                self.text_embed = nn.Linear(self.config.text_width, hidden)
            if self.config.previous_error:
                self.error_embed = nn.Linear(2 * layers, hidden)

    def forward(self, step: StepContext, inputs: StepInputs | None = None) -> Tensor:
        """Answer one step with logits ``[L]`` float32, or ``[L, A]`` with several alternatives."""
        return self.logits([step], [inputs])[0]

    def logits(self, steps: Sequence[StepContext], inputs: Sequence[StepInputs | None] = ()) -> Tensor:
        """Answer several steps with logits ``[steps, L]`` float32, or ``[steps, L, A]`` with several alternatives.

        Args:
            steps: The diffusion steps.
            inputs: Further inputs of each step, read where the config asks for them; empty = unknown.

        Raises:
            ValueError: No step was given, or an input has the wrong size.
        """
        if not steps:
            raise ValueError("no diffusion step given")
        device = next(self.parameters()).device
        pixels = self.config.pixels_per_latent
        rows = [
            (step.sigma, step.cfg_scale, step.latent_size[1] * pixels, step.latent_size[0] * pixels) for step in steps
        ]
        sigma, cfg, width, height = torch.tensor(rows, dtype=torch.float32, device=device).unbind(dim=1)
        features = [self.sigma_embed(sigma), self.cfg_embed(cfg), self.resolution_embed(width, height)]
        hidden = self.mlp[0](torch.cat(features, dim=-1)) + self._further(list(inputs) or [None] * len(steps), device)
        answer: Tensor = self.mlp[1:](hidden).float()
        if self.actions == 2:
            return answer
        answer = answer.view(len(steps), self.layers, self.actions - 1)
        return torch.cat([answer, torch.zeros_like(answer[..., :1])], dim=-1)

    def _further(self, inputs: Sequence[StepInputs | None], device: torch.device) -> Tensor | float:
        """What further inputs add to the first hidden layer, ``[steps, hidden]``; 0 where there are none."""
        known = [one or StepInputs() for one in inputs]
        added: Tensor | float = 0.0
        if self.config.text_width:
            text = [one.text for one in known]
            added = added + self.text_embed(_stack(text, self.config.text_width, "text").to(device))
        if self.config.previous_error:
            errors = _stack([one.previous_error for one in known], self.layers, "previous_error").to(device)
            there = torch.tensor([[float(one.previous_error is not None)] for one in known], device=device)
            # Errors spread over decades; where none is known a flag says so.
            logs = errors.clamp_min(1e-6).log() * there
            added = added + self.error_embed(torch.cat([logs, there.expand_as(logs)], dim=1))
        return added

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add a constant to every logit of full attention: more of it (positive) or less everywhere."""
        self.get_parameter("mlp.4.bias").view(self.layers, self.actions - 1)[:, 0].add_(amount)

    @torch.no_grad()
    def tilt(self, amounts: Tensor) -> None:
        """Add to the logits of every step; ``amounts`` is ``[L, A - 1]``, the last alternative's logit stays 0."""
        bias = self.get_parameter("mlp.4.bias")
        bias.view(self.layers, self.actions - 1).add_(amounts.to(bias))


def _stack(values: Sequence[Tensor | None], width: int, name: str) -> Tensor:
    """Vectors ``[steps, width]`` float32, zeros where there is none."""
    rows = [torch.zeros(width) if value is None else value.detach().to("cpu", torch.float32) for value in values]
    for row in rows:
        if row.shape != (width,):
            raise ValueError(f"the policy reads {name} of width {width}, got {tuple(row.shape)}")
    return torch.stack(rows)


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
        ValueError: ``scores`` does not fit contexts and layers, or the policy has several alternatives.
    """
    if policy.actions != 2:
        raise ValueError("scores rank full attention against one alternative; this policy chooses among several")
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
