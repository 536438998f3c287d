"""Students of attention layers: what they compute, when they may serve, and how a router calls them."""

from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.feature_map import StudentFeatureMap
from ttr_distill.student.feature_map_catalog import FeatureMaps, MapRequest
from ttr_distill.student.hkr import HkrConfig, HkrStudent
from ttr_distill.student.joint import JointConfig, JointStudent
from ttr_distill.student.near_far import NearFarStudent
from ttr_distill.student.presets import PRESETS, StudentConfig, build_student, preset
from ttr_distill.student.readiness import LayerReadiness, ReadinessConfig, ReadinessTracker, ReadyGuard
from ttr_distill.student.serving import serving_copy

__all__ = [
    "PRESETS",
    "FeatureMaps",
    "HkrConfig",
    "HkrStudent",
    "JointConfig",
    "JointStudent",
    "LayerReadiness",
    "MapRequest",
    "NearFarStudent",
    "ReadinessConfig",
    "ReadinessTracker",
    "ReadyGuard",
    "StudentAttention",
    "StudentBackend",
    "StudentBank",
    "StudentConfig",
    "StudentFeatureMap",
    "build_student",
    "preset",
    "serving_copy",
]
