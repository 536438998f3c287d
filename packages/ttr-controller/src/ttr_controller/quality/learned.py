"""Learned distances between images: LPIPS and DreamSim, through their own packages."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttr_controller.quality.models import LazyModel, imported, require

LpipsNet = Literal["alex", "squeeze", "vgg"]
DreamSimType = Literal["open_clip_vitb32", "clip_vitb32", "dino_vitb16", "dinov2_vitb14", "synclr_vitb16", "ensemble"]
_BACKBONES = MappingProxyType(
    {
        "alex": "alexnet-owt-7be5be79.pth",
        "squeeze": "squeezenet1_1-b8a52dc0.pth",
        "vgg": "vgg16-397923af.pth",
    }
)
_LPIPS_SIDE = 64
_DREAMSIM_SIDE = 224


class LpipsDistance:
    """LPIPS of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".

    Args:
        net: Backbone: ``"alex"`` (the published default), ``"squeeze"`` (smallest), ``"vgg"``.
        random_backbone: Draw the backbone's weights from a fixed seed instead of loading them. That needs no download
            and is a smoke test, not a measure of what people see.

    Raises:
        QualityError: The package is missing.
    """

    def __init__(self, net: LpipsNet = "alex", *, random_backbone: bool = False) -> None:
        if net not in _BACKBONES:
            raise ValueError(f"LPIPS net must be one of {', '.join(_BACKBONES)}, got {net!r}")
        require("lpips", "lpips")
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        self.net = net
        self.random_backbone = random_backbone
        self.model = LazyModel(
            self._load,
            what=f"the LPIPS backbone {net}",
            remedy=f"with a network it is downloaded once, without one place {_BACKBONES[net]} in {folder}",
        )

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare ``[B, 3, H, W]`` images in [0, 1], both sides at least 64; answer ``[B]``, 0 = equal."""
        if min(student.shape[-2:]) < _LPIPS_SIDE:
            raise ValueError(f"LPIPS needs images of at least {_LPIPS_SIDE} pixels a side, got {tuple(student.shape)}")
        left, right = (2.0 * image.float().to(teacher.device).clamp(0.0, 1.0) - 1.0 for image in (student, teacher))
        distance: Tensor = self.model.on(teacher.device)(left, right)
        return distance.flatten()

    def _load(self) -> nn.Module:
        lpips = imported("lpips", "lpips")
        # The random backbone, if wanted, is drawn from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = lpips.LPIPS(net=self.net, pnet_rand=self.random_backbone, verbose=False)
        return model


class DreamSimDistance:
    """DreamSim of Fu et al. 2023, "DreamSim: Learning New Dimensions of Human Visual Similarity".

    Args:
        kind: Which model. The types with ``dino`` and the ensemble also run code that they download from GitHub;
            the others do not.
        folder: Where the weights are or will be; torch's hub folder if ``None``.

    Raises:
        QualityError: The package is missing.
    """

    def __init__(self, kind: DreamSimType = "open_clip_vitb32", folder: Path | None = None) -> None:
        require("dreamsim", "dreamsim")
        self.kind = kind
        self.folder = folder or Path(torch.hub.get_dir()) / "dreamsim"
        self.model = LazyModel(
            self._load,
            what=f"DreamSim's {kind}",
            remedy=f"with a network it is downloaded once, without one unpack dreamsim_{kind}_checkpoint.zip "
            f"in {self.folder}",
        )

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare ``[B, 3, H, W]`` images in [0, 1]; answer ``[B]``, 0 = equal."""
        model = self.model.on(teacher.device)
        left, right = (_squared(image.to(teacher.device)) for image in (student, teacher))
        distance: Tensor = model(left, right)
        return distance.flatten()

    def _load(self) -> nn.Module:
        dreamsim = imported("dreamsim", "dreamsim")
        self.folder.mkdir(parents=True, exist_ok=True)
        model: nn.Module
        model, _ = dreamsim.dreamsim(pretrained=True, device="cpu", cache_dir=str(self.folder), dreamsim_type=self.kind)
        return model


def _squared(images: Tensor) -> Tensor:
    """Stretch ``[B, 3, H, W]`` images to the 224 x 224 that DreamSim reads."""
    size = (_DREAMSIM_SIDE, _DREAMSIM_SIDE)
    return functional.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
