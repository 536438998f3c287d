"""Checkpoint files of the ``flux2_ttr`` family: one ``torch.save`` file, read without running any code in it."""

from ttr_distill.legacy.payload import (
    MODEL_KEY,
    MOMENTS,
    check_model,
    moments_by_name,
    number,
    read_payload,
    tensors_of,
    write_payload,
)
from ttr_distill.legacy.students import LegacyStudents, migrated_alpha, read_legacy_students
from ttr_distill.legacy.writing import FORMAT, TRAINING_SETTINGS, write_legacy_students

__all__ = [
    "FORMAT",
    "MODEL_KEY",
    "MOMENTS",
    "TRAINING_SETTINGS",
    "LegacyStudents",
    "check_model",
    "migrated_alpha",
    "moments_by_name",
    "number",
    "read_legacy_students",
    "read_payload",
    "tensors_of",
    "write_legacy_students",
    "write_payload",
]
