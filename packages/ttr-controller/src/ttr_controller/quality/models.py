"""Learned scorers as a whole: how their models are loaded, moved and asked."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from ttr_distill.grad import training_mode

LOAD_ERRORS = (OSError, RuntimeError, ValueError, ImportError, LookupError)
"""What libraries raise when weights are neither on disk nor to be had."""


class QualityError(ValueError):
    """A scorer cannot be used; the message says what to install or which file to place where."""


class Distance(Protocol):
    """How far images are from the teacher's; 0 = equal."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare ``[B, 3, H, W]`` images in [0, 1]; answer ``[B]``."""
        ...


class Scorer(Protocol):
    """How good images are by themselves; higher is better.

    Attributes:
        needs_prompts: Whether an image is judged by its prompt.
    """

    needs_prompts: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score ``[B, 3, H, W]`` images in [0, 1]; answer ``[B]``."""
        ...


class LazyModel:
    """A network that is loaded when it is first asked for, and follows the images to their device.

    Args:
        load: Makes the network; called once.
        what: What it is, for messages.
        remedy: What to do if it cannot be loaded.
    """

    def __init__(self, load: Callable[[], nn.Module], *, what: str, remedy: str) -> None:
        self._load = load
        self._what = what
        self._remedy = remedy
        self._model: nn.Module | None = None
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device | None:
        """Where the network is; ``None`` before it is loaded."""
        return self._device

    def on(self, device: torch.device | str) -> nn.Module:
        """Return the network, in evaluation mode, on a device.

        Raises:
            QualityError: It cannot be loaded.
        """
        wanted = torch.device(device)
        # Weights made in inference mode could not be moved into an ordinary context later.
        with training_mode():
            if self._model is None:
                try:
                    self._model = self._load().eval().requires_grad_(False)
                except QualityError:
                    raise
                except LOAD_ERRORS as error:
                    cause = " ".join(str(error).split())[:200]
                    raise QualityError(f"{self._what} cannot be loaded ({cause}); {self._remedy}") from error
            if self._device != wanted:
                self._model.to(wanted)
                self._device = wanted
        return self._model

    def offload(self) -> None:
        """Move the network to the CPU; the next use brings it back."""
        if self._model is not None:
            self._model.to("cpu")
            self._device = torch.device("cpu")


class Penalty:
    """How much lower students score than the teacher: ``relu(teacher - student)``.

    Teacher scores are kept: a training meets the same teacher image again and again.

    Args:
        scorer: Scores images.
        capacity: Scores kept; the one unused for longest goes first.
    """

    def __init__(self, scorer: Scorer, *, capacity: int = 512) -> None:
        self.scorer = scorer
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    @torch.no_grad()
    def __call__(self, student: Tensor, teacher: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Compare.

        Args:
            student: ``[B, 3, H, W]`` in [0, 1].
            teacher: ``[B, 3, H, W]`` in [0, 1].
            prompts: B prompts; empty if the scorer reads none.

        Returns:
            Penalties, scores of the student and scores of the teacher, each ``[B]`` float32 on the CPU.
        """
        mine = self.scorer(student, prompts).float().cpu()
        theirs = self._teacher(teacher, prompts)
        return torch.relu(theirs - mine), mine, theirs

    def _teacher(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        keys = [
            (prompts[row] if prompts else "", hashlib.sha256(image.float().cpu().contiguous().numpy().data).digest())
            for row, image in enumerate(images)
        ]
        missing = [row for row, key in enumerate(keys) if key not in self._kept]
        if missing:
            scores = self.scorer(images[missing], [prompts[row] for row in missing] if prompts else ())
            self._kept.update({keys[row]: float(score) for row, score in zip(missing, scores, strict=True)})
        for key in keys:
            self._kept.move_to_end(key)
        found = torch.tensor([self._kept[key] for key in keys])
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found


def require(package: str, extra: str) -> None:
    """Check that a package is installed, without importing it.

    Raises:
        QualityError: It is not; the message names the extra.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:
        found = False
    if not found:
        raise QualityError(f"the package {package} is missing; install ttr-controller[{extra}]")


def imported(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        QualityError: It is missing, or a package it needs is.
    """
    require(package, extra)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise QualityError(f"{package} cannot be imported ({error}); install ttr-controller[{extra}]") from error


def release(*scorers: object) -> None:
    """Move the networks of scorers and distances that hold any to the CPU."""
    for scorer in scorers:
        model = getattr(scorer, "model", None)
        if isinstance(model, LazyModel):
            model.offload()
