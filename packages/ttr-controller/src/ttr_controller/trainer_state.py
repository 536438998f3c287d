"""What a controller training keeps between sessions: tensors for a weights file, plain values for its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from attn_dispatch.call import StepContext
from torch import Tensor, nn


@dataclass
class BestPolicy:
    """The best candidate at equal cost so far.

    Attributes:
        error: Mean error on the validation images.
        mask: ``[steps, L]``: bool, True = full attention, or int64 number of the attention with several alternatives.
        weights: State of the policy that ranks the slots so.
    """

    error: float = math.inf
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    weights: dict[str, Tensor] = field(default_factory=dict)


class TrainerManifest(TypedDict):
    """The values of a training that JSON can hold.

    Attributes:
        layers: Names of the layers, in the order of the policy's logits.
        policy: Fields of ``PolicyConfig``.
        seed: Seed of the training.
        updates: Updates done.
        eligible: Layers whose student could run.
        target_full: Share of full attention that was learnt for.
        unit: Error of students everywhere, the unit of the reward.
        prompts: Validation prompts.
        seeds: Validation seeds.
        contexts: Diffusion steps as ``[sigma, cfg_scale, rows, columns]``.
        best_error: Validation error of the best candidate; ``None`` before the first.
        best_plan: Number of its attention in each slot, ``[steps][L]``.
        actions: Attentions that a layer chooses among.
        baseline: Running mean of rewards and how many it has seen.
    """

    layers: list[str]
    policy: dict[str, float]
    seed: int
    updates: int
    eligible: list[bool]
    target_full: float
    unit: float
    prompts: list[str]
    seeds: list[int]
    contexts: list[list[float]]
    best_error: float | None
    best_plan: list[list[int]]
    actions: int
    baseline: list[float]


class TrainerState(TypedDict):
    """Everything a resumed training needs.

    Attributes:
        tensors: ``policy.*``, ``optimizer.<parameter>.*`` and ``best.*``.
        manifest: The rest.
    """

    tensors: dict[str, Tensor]
    manifest: TrainerManifest


def unfit(saved: TrainerManifest, wanted: TrainerManifest) -> str:
    """Name what the weights depend on and differs, as ``name: wanted here, saved there``; empty if nothing does."""
    theirs = {"layers": saved["layers"], "actions": saved["actions"], **saved["policy"]}
    ours = {"layers": wanted["layers"], "actions": wanted["actions"], **wanted["policy"]}
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name}: {ours.get(name)} here, {theirs.get(name)} there" for name in names)


def pack_contexts(contexts: tuple[StepContext, ...]) -> list[list[float]]:
    """Diffusion steps as plain numbers."""
    return [[step.sigma, step.cfg_scale, *step.latent_size] for step in contexts]


def unpack_contexts(rows: list[list[float]]) -> tuple[StepContext, ...]:
    """Diffusion steps from ``pack_contexts``."""
    return tuple(StepContext(sigma, cfg, (int(height), int(width))) for sigma, cfg, height, width in rows)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts so, without the start."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pack_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """An optimizer's tensors as ``optimizer.<parameter>.<moment>``."""
    return {
        f"optimizer.{name}.{key}": value.detach().clone()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a fresh optimizer the tensors of ``pack_optimizer``."""
    for name, parameter in module.named_parameters():
        moments = with_prefix(tensors, f"optimizer.{name}.")
        if moments:
            optimizer.state[parameter] = {key: value.clone() for key, value in moments.items()}
