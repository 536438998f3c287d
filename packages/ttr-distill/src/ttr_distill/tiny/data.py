"""Pictures, prompts and the retrieval measure of the tiny teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from ttr_distill.tiny.teacher import VOCABULARY_FILE, WEIGHTS
from ttr_distill.tiny.text import Vocabulary

THUMBNAIL = 16
THUMBNAILS_FILE = "thumbnails.safetensors"

COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "white": (1.0, 1.0, 1.0),
        "yellow": (1.0, 0.9, 0.45),
        "pink": (1.0, 0.72, 0.8),
        "blue": (0.55, 0.78, 1.0),
        "green": (0.62, 0.88, 0.62),
        "purple": (0.76, 0.65, 0.95),
        "gray": (0.62, 0.62, 0.66),
        "black": (0.08, 0.08, 0.1),
    }
)
"""Backgrounds by name."""


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Pictures with transparency, one a concept.

    Attributes:
        concepts: Name of each picture.
        pixels: ``[C, S, S, 4]`` uint8, colours already multiplied by opacity, so that any average of pixels is right.
    """

    concepts: tuple[str, ...]
    pixels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if self.pixels.dtype is not torch.uint8 or len(shape) != 4 or shape[0] != len(self.concepts) or shape[3] != 4:
            raise ValueError(f"pixels must be uint8 [{len(self.concepts)}, S, S, 4], got {self.pixels.dtype} {shape}")

    def resized(self, size: int) -> PictureSet:
        """Shrink to ``size`` pixels by averaging areas."""
        planes = self.pixels.permute(0, 3, 1, 2).float()
        small = functional.interpolate(planes, size=(size, size), mode="area")
        return PictureSet(self.concepts, small.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous())

    def on(self, index: Tensor, colours: Tensor) -> Tensor:
        """Lay pictures ``index`` ``[B]`` on ``colours`` ``[B, 3]``: images ``[B, 3, S, S]`` in ``[0, 1]``."""
        planes = self.pixels[index].permute(0, 3, 1, 2).float() / 255
        return planes[:, :3] + (1 - planes[:, 3:]) * colours[:, :, None, None]

    def dumps(self) -> bytes:
        """Write as safetensors."""
        return bytes(save({"pixels": self.pixels}, metadata={"concepts": json.dumps(self.concepts)}))

    @classmethod
    def load(cls, path: Path) -> PictureSet:
        """Read the file that ``dumps`` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(tuple(json.loads(file.metadata()["concepts"])), file.get_tensor("pixels"))


@lru_cache(maxsize=4)
def load_thumbnails(directory: Path = WEIGHTS) -> PictureSet:
    """Thumbnails, 16 x 16, of everything the teacher in ``directory`` can draw."""
    return PictureSet.load(directory / THUMBNAILS_FILE)


@lru_cache(maxsize=4)
def load_vocabulary(directory: Path = WEIGHTS) -> Vocabulary:
    """Word list of the teacher in ``directory``; needs neither diffusers nor the weights."""
    return Vocabulary.load(directory / VOCABULARY_FILE)


def retrieve(images: Tensor, prompts: Sequence[str], *, directory: Path = WEIGHTS) -> list[str]:
    """Name what each image shows: the concept whose picture is nearest.

    Every picture is laid on the background that the prompt asks for; nearest is the smallest L2 distance of 16 x 16
    colour thumbnails. It is a coarse measure: it sees colour and silhouette, not sharpness.

    Args:
        images: ``[B, 3, h, w]`` in ``[0, 1]``.
        prompts: Caption of each image; only its background is read.
        directory: Folder of the teacher whose pictures are searched.

    Returns:
        One concept an image.

    Raises:
        ValueError: Numbers of images and prompts differ.
    """
    thumbnails, vocabulary = load_thumbnails(directory), load_vocabulary(directory)
    if images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
        raise ValueError(f"images must be [{len(prompts)}, 3, h, w], one a prompt; got {tuple(images.shape)}")
    seen = functional.interpolate(images.detach().float().cpu(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    everything = torch.arange(len(thumbnails.concepts))
    found = []
    for image, prompt in zip(seen, prompts, strict=True):
        colour = torch.tensor(vocabulary.colours[vocabulary.parse(prompt)[1]])
        distance = (thumbnails.on(everything, colour.expand(len(everything), 3)) - image).square().sum(dim=(1, 2, 3))
        found.append(thumbnails.concepts[int(distance.argmin())])
    return found


def retrieval_accuracy(images: Tensor, prompts: Sequence[str], *, directory: Path = WEIGHTS) -> float:
    """Share of images in which ``retrieve`` finds the prompt's concept.

    Args:
        images: ``[B, 3, h, w]`` in ``[0, 1]``.
        prompts: B captions.
        directory: Folder of the teacher whose pictures are compared.

    Raises:
        ValueError: No image was given, or numbers of images and prompts differ.
    """
    if not prompts:
        raise ValueError("retrieval_accuracy needs at least one image")
    vocabulary = load_vocabulary(directory)
    found = retrieve(images, prompts, directory=directory)
    return sum(name == vocabulary.parse(prompt)[0] for name, prompt in zip(found, prompts, strict=True)) / len(prompts)


def training_prompts() -> tuple[str, ...]:
    """Prompts for distillation and for learning to route.

    Their concepts are disjoint from those of ``heldout_prompts``. The teacher saw the concepts of both in its own
    training: what is held out is held out from students and controllers, not from the teacher.
    """
    return _TRAINING


def heldout_prompts() -> tuple[str, ...]:
    """Prompts for measuring students and controllers; disjoint in concepts from ``training_prompts``.

    The teacher saw these concepts in its own training: "held out" means held out from distillation and routing.
    """
    return _HELDOUT


_TRAINING = (
    "red apple",
    "tiger face on blue",
    "hamburger on yellow",
    "panda",
    "cactus on pink",
    "banana on purple",
    "watermelon on white",
    "fox on green",
    "tomato on blue",
    "frog on yellow",
    "broccoli on pink",
    "pig face on white",
    "doughnut on blue",
    "lemon on purple",
    "polar bear on pink",
    "carrot",
    "pizza on black",
    "grapes on yellow",
    "tulip on green",
    "chicken on blue",
    "cookie on gray",
    "orca on white",
    "pancakes on purple",
    "maple leaf on blue",
)

_HELDOUT = (
    "strawberry on blue",
    "bear",
    "sunflower",
    "avocado on yellow",
    "penguin on blue",
    "koala on pink",
    "pineapple on purple",
    "lion on white",
    "eggplant on yellow",
    "butterfly on purple",
    "green apple on pink",
    "tangerine",
    "lady beetle on green",
    "peach on blue",
    "rose on gray",
    "cow face on green",
)
