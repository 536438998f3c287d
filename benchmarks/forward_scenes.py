"""What the forward benchmark measures: which part of a Flux transformer, on how many tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

TEXT = 512
"""Text tokens of Flux.1-dev."""
WIDTH = 128
"""Width of a head of Flux.1-dev."""
FLUX_PARAMETERS = 6.46e9
"""Parameters of Flux.1-dev that one token meets; the others belong to the text stream, to steps, or to the ends."""


class Cut(NamedTuple):
    """How much of Flux.1-dev is built; everything else has its sizes.

    Attributes:
        double: Double-stream blocks, of 19.
        single: Single-stream blocks, of 38.
        heads: Heads of width 128, of 24; the width of the model follows.
    """

    double: int
    single: int
    heads: int

    def __str__(self) -> str:
        blocks = f"{self.double} double and {self.single} single blocks"
        return f"{blocks}, {self.heads} heads of {WIDTH}" if self != FULL else "the whole model"

    @property
    def layers(self) -> int:
        """Attention layers."""
        return self.double + self.single


FULL = Cut(19, 38, 24)
BLOCK = Cut(0, 1, 24)
"""One block at full width: the share of attention in it is that of the whole model."""
NARROW = Cut(1, 2, 4)
NOT_TAYLOR = ("exact", "near-far t4 k8", "near-far t8 k2", "hkr")


@dataclass(frozen=True)
class Scene:
    """One denoising step.

    Attributes:
        name: For the table.
        cut: The model.
        image: Rows and columns of image tokens; a token is 16 x 16 pixels.
        references: Further images of 64 x 64 tokens among the keys.
        rounds: Times that every method is timed, in turns; the fastest counts.
        only: Methods that are run; all if empty.
    """

    name: str
    cut: Cut
    image: tuple[int, int]
    references: int = 0
    rounds: int = 3
    only: tuple[str, ...] = ()

    @property
    def image_tokens(self) -> int:
        """Tokens of the image and of its references."""
        return self.image[0] * self.image[1] + self.references * 64 * 64

    @property
    def tokens(self) -> int:
        """Tokens, text and images."""
        return TEXT + self.image_tokens


def cpu_scenes() -> list[Scene]:
    """What one thread can do: a narrow model, where attention weighs six times as much, and one block of full width.

    The first scene is too small for anything to pay off, the second lies where near-far attention begins to. At 4K and
    8K one head is left for the comparison: at 8K exact attention takes seven minutes for it, and a profile of the many
    small operators of the Taylor series would not fit into 24 GiB.
    """
    return [
        Scene("narrow single block, 512 px", Cut(0, 1, 4), (32, 32), rounds=40),
        Scene("narrow single block, 832 px", Cut(0, 1, 4), (52, 52), rounds=10),
        Scene("narrow, 1K", NARROW, (64, 64)),
        Scene("narrow single block, 2K", Cut(0, 1, 4), (128, 128), rounds=1),
        Scene("narrow single block, 1 MP + 4 references", Cut(0, 1, 4), (64, 64), 4, rounds=1, only=NOT_TAYLOR),
        Scene("narrow single block, 4K", Cut(0, 1, 4), (256, 256), rounds=1, only=("exact", "near-far t8 k2")),
        Scene("one-head single block, 4K", Cut(0, 1, 1), (256, 256), rounds=1),
        Scene("one-head single block, 8K", Cut(0, 1, 1), (512, 512), rounds=1, only=NOT_TAYLOR),
        Scene("full-width block, 1K", BLOCK, (64, 64), rounds=2, only=("exact", "near-far t4 k8", "near-far t8 k2")),
        Scene("full-width block, 2K", BLOCK, (128, 128), rounds=1, only=("exact", "near-far t8 k2")),
    ]


def cuda_scenes() -> list[Scene]:
    """The whole model at the sizes that it is used at."""
    return [
        Scene("Flux.1-dev, 1K", FULL, (64, 64), rounds=5),
        Scene("Flux.1-dev, 1 MP + 4 references", FULL, (64, 64), references=4, rounds=5),
        Scene("Flux.1-dev, 2K", FULL, (128, 128), rounds=5),
        Scene("Flux.1-dev, 4K", FULL, (256, 256), rounds=3),
        Scene("Flux.1-dev, 8K", FULL, (512, 512), rounds=1, only=("exact", "near-far t8 k2")),
    ]


def build(cut: Cut, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Make a transformer with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            model = FluxTransformer2DModel(
                num_layers=cut.double,
                num_single_layers=cut.single,
                num_attention_heads=cut.heads,
                attention_head_dim=WIDTH,
                guidance_embeds=True,
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def inputs(scene: Scene, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the arguments of one forward: a latent, its references, a text and a noise level."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    ids = [_ids(0, *scene.image), *(_ids(index + 1, 64, 64) for index in range(scene.references))]
    return {
        "hidden_states": draw(1, scene.image_tokens, 64),
        "encoder_hidden_states": draw(1, TEXT, 4096),
        "pooled_projections": draw(1, 768),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        # Never in half precision, which cannot tell rows beyond 256 apart.
        "img_ids": torch.cat(ids).to(device),
        "txt_ids": torch.zeros(TEXT, 3, device=device),
    }


def _ids(image: int, rows: int, columns: int) -> Tensor:
    """Position ids ``[N, 3]`` of one image in raster order."""
    axes = (torch.full((1,), float(image)), torch.arange(rows).float(), torch.arange(columns).float())
    return torch.cartesian_prod(*axes)


def attention_share(tokens: int, cut: Cut = FULL) -> float:
    """Share of attention in the arithmetic of one forward, ``4 N^2`` against two operations per parameter and token.

    Args:
        tokens: N, text and images.
        cut: The model; its parameters per token grow with blocks and with the square of the width.
    """
    width = cut.heads * WIDTH
    attention = 4.0 * tokens * tokens * width * cut.layers
    scale = (width / (FULL.heads * WIDTH)) ** 2 * cut.layers / FULL.layers
    return attention / (attention + 2.0 * FLUX_PARAMETERS * scale * tokens)


def ceiling(share: float) -> float:
    """How many times faster the whole would be if attention took no time (Amdahl's law)."""
    return 1.0 / (1.0 - share)
