"""Distillation: capture while sampling, replay, update, judge; or record first and learn from the recording."""

from ttr_distill.training.calibration import CalibrateConfig, calibrate
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig, Distiller
from ttr_distill.training.loss import DistillLoss
from ttr_distill.training.recorder import CaptureRecorder
from ttr_distill.training.replay import ReplayBuffer, ReplaySample
from ttr_distill.training.state import SavedState
from ttr_distill.training.update import UpdateConfig

__all__ = [
    "CalibrateConfig",
    "CaptureConfig",
    "CaptureRecorder",
    "DistillConfig",
    "DistillLoss",
    "Distiller",
    "ReplayBuffer",
    "ReplaySample",
    "SavedState",
    "UpdateConfig",
    "calibrate",
]
