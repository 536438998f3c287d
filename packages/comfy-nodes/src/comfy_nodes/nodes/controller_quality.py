"""The image error that a controller is trained on."""

from ttr_controller.quality.objective import QualityModels, QualityObjective, QualityWeights

from .training_config import TrainingParameters

LATENT_WEIGHTS = ("rmse_weight", "cosine_weight")
IMAGE_WEIGHTS = ("lpips_weight", "dreamsim_weight", "hps_weight", "biqa_quality_weight", "biqa_aesthetic_weight")
"""Weights of errors that look at decoded images."""


def needs_images(parameters: TrainingParameters) -> bool:
    """Whether every sampled image must be decoded."""
    return any(getattr(parameters, name) > 0.0 for name in IMAGE_WEIGHTS)


def quality_objective(parameters: TrainingParameters) -> QualityObjective:
    """Make the error from its weights; networks are loaded when the first images are compared.

    Raises:
        ValueError: Every weight is 0, or a weight asks for what is not there.
    """
    weights = QualityWeights(**{name: getattr(parameters, name) for name in (*LATENT_WEIGHTS, *IMAGE_WEIGHTS)})
    objective = QualityObjective(weights, models=QualityModels(offload=True))
    if objective.needs_prompts:
        raise ValueError("hps_weight judges by the text of the prompt, which a conditioning does not tell; set it to 0")
    return objective
