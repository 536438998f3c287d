"""Phase 1: distil a cheap attention student per layer, online, while sampling."""

from ttr_distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ttr_distill.embeddings import ScalarSinusoidalEmbedding
from ttr_distill.image_gate import ImageGate, gate_on_images
from ttr_distill.legacy import LegacyStudents, read_legacy_students, write_legacy_students
from ttr_distill.metrics import JsonlSink, MetricSink, QueuedSink, open_sinks
from ttr_distill.saved_students import SavedStudents, load_students, save_students
from ttr_distill.student import (
    PRESETS,
    FeatureMaps,
    HkrConfig,
    JointConfig,
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
    "FeatureMaps",
    "HkrConfig",
    "ImageGate",
    "JointConfig",
    "JsonlSink",
    "LegacyStudents",
    "MetricSink",
    "QueuedSink",
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
    "gate_on_images",
    "load_checkpoint",
    "load_students",
    "open_sinks",
    "preset",
    "read_legacy_students",
    "save_checkpoint",
    "save_students",
    "write_legacy_students",
]
