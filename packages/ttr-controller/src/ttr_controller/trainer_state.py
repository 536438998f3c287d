"""What a controller training keeps between sessions: tensors for a weights file, plain values for its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from attn_dispatch.call import StepContext
from torch import Tensor, nn


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
        best_mask: Its mask, ``[steps][L]``.
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
    best_mask: list[list[bool]]


class TrainerState(TypedDict):
    """Everything a resumed training needs.

    Attributes:
        tensors: ``policy.*``, ``optimizer.<parameter>.*`` and ``best.*``.
        manifest: The rest.
    """

    tensors: dict[str, Tensor]
    manifest: TrainerManifest


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
