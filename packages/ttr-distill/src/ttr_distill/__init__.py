"""Phase 1: distil a cheap attention student per layer, online, while sampling."""

from ttr_distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ttr_distill.embeddings import ScalarSinusoidalEmbedding
from ttr_distill.metrics import JsonlSink, MetricSink
from ttr_distill.saved_students import SavedStudents, load_students, save_students
from ttr_distill.student import (
    PRESETS,
    HkrConfig,
    ReadinessConfig,
    ReadinessTracker,
    ReadyGuard,
    StudentAttention,
    StudentBackend,
    StudentBank,
    StudentConfig,
    build_student,
    preset,
)
from ttr_distill.training import CaptureConfig, DistillConfig, Distiller, UpdateConfig

__all__ = [
    "PRESETS",
    "CaptureConfig",
    "Checkpoint",
    "CheckpointError",
    "DistillConfig",
    "Distiller",
    "HkrConfig",
    "JsonlSink",
    "MetricSink",
    "ReadinessConfig",
    "ReadinessTracker",
    "ReadyGuard",
    "SavedStudents",
    "ScalarSinusoidalEmbedding",
    "StudentAttention",
    "StudentBackend",
    "StudentBank",
    "StudentConfig",
    "UpdateConfig",
    "build_student",
    "load_checkpoint",
    "load_students",
    "preset",
    "save_checkpoint",
    "save_students",
]
