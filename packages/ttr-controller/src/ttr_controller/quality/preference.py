"""How well images fit their prompt in the eyes of people: HPS v2, and scorers of other packages.

Another package offers a scorer by an entry point. For ImageReward, whose own requirements fit no current environment,
it is a small package with

    [project.entry-points."ttr_controller.scorers"]
    imagereward = "my_scorers:ImageRewardScorer"

and a class that takes no arguments, has ``needs_prompts = True``, and answers ``(images, prompts)`` with the scores
``ImageReward.load("ImageReward-v1.0").score(prompt, image)`` of each pair; then
``QualityObjective(scorers={"imagereward": 0.1})``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttr_controller.quality.models import LazyModel, QualityError, Scorer, imported, require

SCORER_GROUP = "ttr_controller.scorers"
"""Entry points of other packages: each names a function without arguments that returns a ``Scorer``."""
HPS_REPOSITORY, HPS_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images."""


class HpsScorer:
    """Human preference score of Wu et al. 2023, "Human Preference Score v2", v2.1: a fine-tuned CLIP.

    The score is the cosine between image and prompt.

    Args:
        checkpoint: The released weights; ``None`` downloads ``HPS_v2.1_compressed.pt`` (4 GB) once.
        architecture: open_clip name of the network that the checkpoint belongs to.

    Raises:
        QualityError: The package is missing.
    """

    needs_prompts = True

    def __init__(self, checkpoint: Path | None = None, architecture: str = "ViT-H-14") -> None:
        require("open_clip", "hps")
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.model = LazyModel(
            self._load,
            what="HPS v2",
            remedy=f"with a network {HPS_FILE} is downloaded once from {HPS_REPOSITORY} on Hugging Face; without one "
            "place that file anywhere and name its path (hps_checkpoint)",
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score ``[B, 3, H, W]`` images in [0, 1] by their B prompts; answer ``[B]``."""
        if len(prompts) != images.shape[0]:
            raise ValueError(f"HPS needs one prompt an image, got {len(prompts)} for {images.shape[0]}")
        model = self.model.on(images.device)
        side = _side(model)
        tokens = imported("open_clip", "hps").get_tokenizer(self.architecture)(list(prompts)).to(images.device)
        half = torch.autocast("cuda") if images.device.type == "cuda" else nullcontext()
        with half:
            seen = cast(Callable[..., Tensor], model.encode_image)(clip_input(images, side), normalize=True)
            read = cast(Callable[..., Tensor], model.encode_text)(tokens, normalize=True)
        return (seen.float() * read.float()).sum(dim=-1)

    def _load(self) -> nn.Module:
        open_clip = imported("open_clip", "hps")
        file = self.checkpoint or _downloaded()
        state = torch.load(file, map_location="cpu", weights_only=True)
        model: nn.Module = open_clip.create_model(self.architecture, pretrained=None)
        model.load_state_dict(state["state_dict"])
        return model


def clip_input(images: Tensor, side: int) -> Tensor:
    """Prepare ``[B, 3, H, W]`` images in [0, 1] for CLIP: shorter side resized, centre cut out, normalised.

    Returns:
        ``[B, 3, side, side]``.
    """
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    resized = functional.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cut = resized[..., top : top + side, left : left + side]
    mean, std = (cut.new_tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (cut - mean) / std


def third_party_scorer(name: str) -> Scorer:
    """Make a scorer that another package offers under the entry point group ``ttr_controller.scorers``.

    Raises:
        QualityError: No installed package offers that name, or it cannot be loaded.
    """
    offered = {point.name: point for point in entry_points(group=SCORER_GROUP)}
    if name not in offered:
        known = ", ".join(sorted(offered)) or "none"
        raise QualityError(
            f"no installed package offers the scorer {name!r} (entry point {SCORER_GROUP}); there is {known}"
        )
    try:
        factory: Callable[[], Scorer] = offered[name].load()
    except (ImportError, AttributeError) as error:
        raise QualityError(f"the scorer {name!r} cannot be loaded: {error}") from error
    return factory()


def _side(model: nn.Module) -> int:
    size: int | Sequence[int] = getattr(cast(nn.Module, model.visual), "image_size", 224)
    return size if isinstance(size, int) else size[0]


def _downloaded() -> Path:
    hub = imported("huggingface_hub", "hps")
    return Path(str(hub.hf_hub_download(HPS_REPOSITORY, HPS_FILE)))
