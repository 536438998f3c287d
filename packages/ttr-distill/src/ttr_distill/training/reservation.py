"""How much device memory training will need, so that a host can be asked for it before a run."""

import logging

import torch

from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.feature_map import KernelFeatureMap, StudentFeatureMap
from ttr_distill.student.feature_map_gradient import ROW_VALUES
from ttr_distill.student.hkr import HkrConfig
from ttr_distill.student.joint import JointConfig
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.update import UpdateConfig

logger = logging.getLogger(__name__)

_FLOAT = 4
"""Bytes of a float32: whatever the host computes in, updates are in float32."""
_SCORE_COPIES = 3
"""Scores, weights and their mask that are alive at once, of exact attention without a gradient."""
_LEARNED_SCORE_COPIES = 6
"""Likewise where scores are learned."""
_CHUNK = 1024
"""Tokens of all heads that a feature network handles at a time where its workspace does not hold all of them."""
_UNKNOWN = 2**28
"""Bytes of an update's workspace where nothing is known of it."""


def training_bytes(bank: StudentBank, sample: ReplaySample | None, config: UpdateConfig) -> int:
    """Estimate what training needs on the device beside the model and the students' own weights.

    Moments of all layers, gradients of one, and the tensors of its update; not the replay, which has its own budget.

    Args:
        bank: The students.
        sample: A call of the size to come, such as the latest one captured; ``None`` = nothing is known yet, and the
            students' workspace is taken for the whole of an update.
        config: How the students are updated.

    Returns:
        Bytes. On the sizes measured between the true peak and twice of it.
    """
    sizes = [_FLOAT * sum(weight.numel() for weight in bank[layer].parameters()) for layer in bank.layers]
    moments = (3 if config.average_decay > 0.0 else 2) * sum(sizes)
    if sample is None:
        settings = bank.config.settings
        return moments + max(sizes) + 2 * int(getattr(settings, "workspace_bytes", _UNKNOWN))
    return moments + max(sizes) + update_bytes(bank[sample.layer], sample, config.key_count)


def update_bytes(student: StudentAttention, sample: ReplaySample, key_count: int) -> int:
    """Estimate what one update of a student on a sample needs: float32 copies, features, scores.

    Args:
        student: Which student.
        sample: Which sample; only its shapes count.
        key_count: See ``UpdateConfig``.
    """
    batch, heads, keys, width = sample.k.shape
    queries = max(sample.train.positions.numel(), sample.heldout.positions.numel())
    columns = width + sample.v.shape[-1]
    copies = batch * heads * columns * (keys + 2 * queries)
    maps = [module for module in student.modules() if isinstance(module, StudentFeatureMap)]
    rest = max(0, keys - key_count) if key_count else 0
    features = sum(_map_bytes(one, batch * heads, keys + queries, rest) for one in maps)
    return features + int(_FLOAT * (copies + batch * heads * queries * _score_columns(student, sample)))


def reserve_device_memory(needed: int, device: torch.device) -> None:
    """Make torch's allocator hold so much free memory on a CUDA device; elsewhere nothing is done.

    What is not to be had is said in a warning, not an error: training gives up parts of itself where memory runs out.

    Args:
        needed: Bytes.
        device: Where.
    """
    if device.type != "cuda" or needed <= 0:
        return
    try:
        torch.empty(needed, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        logger.warning("%s does not have the %d MiB free that training is estimated to need", device, needed >> 20)


def _score_columns(student: StudentAttention, sample: ReplaySample) -> float:
    """Values that a training query holds at once for its exact keys."""
    keys = sample.k.shape[2]
    settings = getattr(student, "config", None)
    if not isinstance(settings, HkrConfig | JointConfig):
        return float(_LEARNED_SCORE_COPIES * keys)
    if isinstance(settings, JointConfig) and settings.radius is not None:
        # All keys are scored, and those outside the window masked.
        return float(_SCORE_COPIES * keys)
    image = sample.layout.image_tokens
    landmarks = max(settings.landmark_minimum, settings.landmark_fraction * image)
    return _SCORE_COPIES * min(float(keys), keys - image + landmarks)


def _map_bytes(feature_map: StudentFeatureMap, rows: int, tokens: int, rest: int) -> int:
    """Bytes of features, of ``rows`` heads with so many tokens, and of what is kept to differentiate them.

    ``rest`` of the tokens teach nothing where the map draws those that do.
    """
    if not isinstance(feature_map, KernelFeatureMap):
        return _FLOAT * rows * tokens * 3 * feature_map.features
    values = ROW_VALUES * feature_map.hidden + 3 * feature_map.features
    alone = feature_map.features + 2 * feature_map.head_width if feature_map.layers == 3 else values
    whole = _FLOAT * rows * ((tokens - rest) * values + rest * alone)
    chunk = 2 * _FLOAT * rows * min(tokens, _CHUNK) * values
    return min(whole, max(feature_map.workspace_bytes, chunk))
