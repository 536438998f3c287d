"""Image quality without a prompt, by the metrics of pyiqa."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ttr_controller.quality.models import LazyModel, Penalty, imported, require

Aspect = Literal["quality", "aesthetic"]
IqaModels = Literal["liqe_mix+nima", "qrealign-mini", "qrealign-lite", "qrealign-pro"]
IQA_MODELS: tuple[IqaModels, ...] = ("liqe_mix+nima", "qrealign-mini", "qrealign-lite", "qrealign-pro")
_EXTRA = "biqa"


class IqaScorer:
    """A no-reference metric of pyiqa, turned so that higher is better.

    Args:
        metric: Name in pyiqa, e.g. ``"liqe_mix"``.
        task: What a metric with several tasks is asked for.
        **options: Further options of ``pyiqa.create_metric``.

    Raises:
        QualityError: The package is missing.
    """

    needs_prompts = False

    def __init__(self, metric: str, *, task: Aspect | None = None, **options: object) -> None:
        self.metric = metric
        self._task = {} if task is None else {"task_": task}
        self.model = _model(metric, options)

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Score ``[B, 3, H, W]`` images in [0, 1]; answer ``[B]``."""
        del prompts
        model = self.model.on(images.device)
        # One by one: some metrics of the library average over the batch.
        scores = torch.stack([model(image[None].float().clamp(0.0, 1.0), **self._task).mean() for image in images])
        scores = scores.float()
        return -scores if getattr(model, "lower_better", False) else scores


class IqaDistance:
    """A full-reference metric of pyiqa as a distance: 0 = equal.

    Args:
        metric: Name in pyiqa; one where lower is better, or one that is 1 for equal images, e.g. ``"ms_ssim"``.
        **options: Further options of ``pyiqa.create_metric``.

    Raises:
        QualityError: The package is missing.
    """

    def __init__(self, metric: str, **options: object) -> None:
        self.metric = metric
        self.model = _model(metric, options)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare ``[B, 3, H, W]`` images in [0, 1]; answer ``[B]``."""
        model = self.model.on(teacher.device)
        pairs = zip(student.to(teacher.device), teacher, strict=True)
        values = [model(*(image[None].float().clamp(0.0, 1.0) for image in pair)).mean() for pair in pairs]
        scores = torch.stack(values).float()
        return scores if getattr(model, "lower_better", False) else 1.0 - scores


def iqa_scorer(aspect: Aspect, models: IqaModels = "liqe_mix+nima") -> IqaScorer:
    """Make the scorer of an aspect.

    Args:
        aspect: ``"quality"`` (faults of the picture) or ``"aesthetic"``.
        models: ``"liqe_mix+nima"``, or one of the larger ``qrealign`` models, which judge both aspects.

    Raises:
        ValueError: Unknown models.
        QualityError: The package is missing.
    """
    if models not in IQA_MODELS:
        raise ValueError(f"quality models must be one of {', '.join(IQA_MODELS)}, got {models!r}")
    if models == "liqe_mix+nima":
        return IqaScorer("liqe_mix" if aspect == "quality" else "nima")
    return IqaScorer(models, task=aspect)


def iqa_penalties(
    quality_weight: float, aesthetic_weight: float, models: IqaModels = "liqe_mix+nima"
) -> dict[str, Penalty]:
    """Make the penalties whose weight is positive; with ``qrealign`` both share one network."""
    wanted: tuple[tuple[Aspect, float], ...] = (("quality", quality_weight), ("aesthetic", aesthetic_weight))
    scorers = {aspect: iqa_scorer(aspect, models) for aspect, weight in wanted if weight > 0.0}
    if len(scorers) == len(wanted) and models != "liqe_mix+nima":
        scorers["aesthetic"].model = scorers["quality"].model
    return {f"biqa_{aspect}": Penalty(scorer) for aspect, scorer in scorers.items()}


def _model(metric: str, options: dict[str, object]) -> LazyModel:
    require("pyiqa", _EXTRA)

    def load() -> nn.Module:
        pyiqa = imported("pyiqa", _EXTRA)
        if metric not in pyiqa.list_models():
            raise ValueError(f"pyiqa has no metric {metric!r}")
        model: nn.Module = pyiqa.create_metric(metric, device=torch.device("cpu"), **options)
        return model

    return LazyModel(
        load,
        what=f"the image quality metric {metric}",
        remedy="with a network its weights are downloaded once; without one copy the folders "
        f"{Path(torch.hub.get_dir()) / 'pyiqa'} and {Path(torch.hub.get_dir()) / 'clip'}, and the Hugging Face cache, "
        "from a machine that has them; it also needs the extra ttr-controller[biqa]",
    )
