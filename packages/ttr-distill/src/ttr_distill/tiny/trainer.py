"""A tiny teacher in training: model, data draws, loss and one update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ttr_distill.tiny.codec import PatchCodec
from ttr_distill.tiny.data import COLOURS, THUMBNAIL, PictureSet
from ttr_distill.tiny.schedule import shift_time
from ttr_distill.tiny.teacher import build_transformer, predict_velocity
from ttr_distill.tiny.text import TextEncoder, Vocabulary

TEXT_WIDTH = 64

ARCHITECTURE: Mapping[str, object] = MappingProxyType(
    {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "guidance_embeds": False,
        "in_channels": 16,
        "joint_attention_dim": TEXT_WIDTH,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_single_layers": 4,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": TEXT_WIDTH,
    }
)


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        parts: ``(side, batch)`` of the batches, taken in turn; ``side * side`` is the number of tokens.
        share: Share of the whole budget.
    """

    parts: tuple[tuple[int, int], ...]
    share: float

    def __post_init__(self) -> None:
        if not self.parts or min(min(part) for part in self.parts) < 1 or self.share <= 0:
            raise ValueError(f"a stage needs positive (side, batch) parts and a positive share, got {self}")


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run.

    Attributes:
        minutes: Budget in CPU minutes.
        seed: Fixes weights, batches and noise.
        stages: Resolutions and their shares of the budget.
        steps: Steps of each stage; empty = measure speed and spend ``minutes``.
        muon_lr: Learning rate of the matrices in the blocks.
        adamw_lr: Learning rate of everything else.
        warmup: Steps of rising learning rate; it falls linearly afterwards.
        caption_dropout: Share of examples without caption.
        plain_share: Share of examples on white with a caption that names no background.
        clip: Largest norm of the gradient.
        ema_horizon: Steps that the average of the weights looks back, at most.
        checkpoint_seconds: CPU seconds between checkpoints.
    """

    minutes: float = 40.0
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(((8, 64),), 0.25),
        Stage(((16, 32),), 0.45),
        Stage(((32, 8), (32, 8), (16, 32)), 0.30),
    )
    steps: tuple[int, ...] = ()
    muon_lr: float = 4e-3
    adamw_lr: float = 2e-3
    warmup: int = 50
    caption_dropout: float = 0.1
    plain_share: float = 0.25
    clip: float = 1.0
    ema_horizon: float = 500.0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or not self.stages:
            raise ValueError(f"minutes must be positive and stages not empty, got {self.minutes}, {self.stages}")
        if self.steps and (len(self.steps) != len(self.stages) or min(self.steps) < 1):
            raise ValueError(f"steps must be {len(self.stages)} positive numbers, one a stage; got {self.steps}")
        if not 0 <= self.caption_dropout < 1 or not 0 <= self.plain_share <= 1:
            raise ValueError("caption_dropout must be in [0, 1) and plain_share in [0, 1]")


@dataclass(frozen=True)
class Batch:
    """Training examples: latents ``[B, N, 16]`` and word numbers ``[B, T]``."""

    latent: Tensor
    ids: Tensor
    side: int


class Trainer:
    """A tiny teacher in training.

    Args:
        pictures: What to learn; at least ``4 * side`` pixels of the largest stage.
        config: Options.
        architecture: Config of the transformer.
    """

    def __init__(
        self, pictures: PictureSet, config: TrainConfig, architecture: Mapping[str, object] = ARCHITECTURE
    ) -> None:
        self.architecture = architecture
        self.config = config
        sides = {side for stage in config.stages for side, _ in stage.parts}
        if pictures.pixels.shape[1] < 4 * max(sides):
            raise ValueError(f"pictures have {pictures.pixels.shape[1]} pixels; {4 * max(sides)} are needed")
        self.pictures = {side: pictures.resized(4 * side) for side in sorted(sides)}
        self.thumbnails = pictures.resized(THUMBNAIL)
        self.vocabulary = Vocabulary.of_concepts(pictures.concepts, COLOURS)
        self.colours = tuple(COLOURS)
        self.palette = torch.tensor([COLOURS[name] for name in self.colours])
        self.generator = torch.Generator().manual_seed(config.seed)
        self.codec = self._fit_codec(sorted(sides)[len(sides) // 2])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.transformer = build_transformer(architecture)
            self.text = TextEncoder(len(self.vocabulary.words), TEXT_WIDTH)
        start_as_identity(self.transformer)
        self.model = nn.ModuleDict({"transformer": self.transformer, "text": self.text})
        self.average = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        matrices, rest = split_parameters(self.model)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.99), weight_decay=0.0),
        )
        self.rates = (config.muon_lr, config.adamw_lr)

    def draw(self, side: int, batch: int, generator: torch.Generator) -> Batch:
        """Draw pictures, backgrounds and captions."""
        config, pictures = self.config, self.pictures[side]
        index = torch.randint(len(pictures.concepts), (batch,), generator=generator)
        colour = torch.randint(1, len(self.colours), (batch,), generator=generator)
        colour[torch.rand(batch, generator=generator) < config.plain_share] = 0
        dropped = torch.rand(batch, generator=generator) < config.caption_dropout
        captions = [
            "" if drop else f"{pictures.concepts[i]} on {self.colours[c]}"
            for i, c, drop in zip(index.tolist(), colour.tolist(), dropped.tolist(), strict=True)
        ]
        latent = self.codec.encode(pictures.on(index, self.palette[colour]))
        return Batch(latent, self.vocabulary.ids(captions), side)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity at random times."""
        size, tokens = batch.latent.shape[:2]
        times = shift_time(torch.sigmoid(torch.randn(size, generator=generator)), tokens)
        noise = torch.randn(batch.latent.shape, generator=generator)
        blend = times[:, None, None]
        noisy = (1 - blend) * batch.latent + blend * noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = predict_velocity(self.transformer, noisy, times, self.text(batch.ids), batch.side, batch.side)
        return (velocity.float() - (noise - batch.latent)).square().mean()

    def step(self, side: int, batch: int, rate: float, decay: float) -> float:
        """Make one update.

        Args:
            side: Rows and columns of tokens.
            batch: Number of examples.
            rate: Factor on the learning rates.
            decay: Decay of the average of the weights.

        Returns:
            The loss before the update.
        """
        for optimizer, base in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.draw(side, batch, self.generator), self.generator)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                self.average[name].lerp_(weight, 1 - decay)
        return float(loss.detach())

    def validation_loss(self, side: int, examples: int = 96) -> float:
        """Loss of the averaged weights on fixed draws of picture, background, time and noise, never trained on."""
        current = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        generator = torch.Generator().manual_seed(1_000_003)
        try:
            self.model.load_state_dict(self.average, strict=False)
            with torch.no_grad():
                losses = [float(self.loss(self.draw(side, 32, generator), generator)) for _ in range(examples // 32)]
        finally:
            self.model.load_state_dict(current, strict=False)
        return sum(losses) / len(losses)

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from ``state_dict``."""
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.average = {name: weight.clone() for name, weight in state["average"].items()}  # type: ignore[attr-defined]
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):  # type: ignore[call-overload]
            optimizer.load_state_dict(stored)
        self.generator.set_state(state["generator"])  # type: ignore[arg-type]

    def _fit_codec(self, side: int) -> PatchCodec:
        pictures = self.pictures[side]
        repeats = 2 if len(pictures.concepts) > 100 else 8
        index = torch.arange(len(pictures.concepts)).repeat(repeats)
        colour = torch.randint(len(self.colours), (len(index),), generator=self.generator)
        return PatchCodec.fit(pictures.on(index, self.palette[colour]))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split into matrices of transformer blocks (for Muon) and everything else (for AdamW)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "transformer_blocks" in name else rest).append(weight)
    return matrices, rest


def start_as_identity(transformer: nn.Module, gate: float = 0.3) -> None:
    """Set modulations to zero with residual gates at ``gate``, and the output to zero."""
    chunks = {"norm1": (6, (2, 5)), "norm1_context": (6, (2, 5)), "norm": (3, (2,)), "norm_out": (2, ())}
    with torch.no_grad():
        for name, module in transformer.named_modules():
            head, _, tail = name.rpartition(".")
            owner = head.rpartition(".")[2]
            if tail == "linear" and owner in chunks and isinstance(module, nn.Linear):
                count, gates = chunks[owner]
                module.weight.zero_()
                module.bias.zero_()
                for number in gates:
                    module.bias.chunk(count)[number].fill_(gate)
            elif name == "proj_out" and isinstance(module, nn.Linear):
                module.weight.zero_()
                module.bias.zero_()
