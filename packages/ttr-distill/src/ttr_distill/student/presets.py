"""Names of students and their settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, cast

import torch
from attn_kernels import NearFarConfig

from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.hkr import HkrConfig, HkrStudent
from ttr_distill.student.near_far import NearFarStudent

PresetName = Literal["hkr", "near_far"]
PRESETS: tuple[PresetName, ...] = ("hkr", "near_far")


@dataclass(frozen=True)
class StudentConfig:
    """Which student, and its settings; ``preset(name, ...)`` makes one.

    Attributes:
        preset: ``"hkr"`` or ``"near_far"``.
        settings: ``HkrConfig`` or ``NearFarConfig``, as the preset needs.
    """

    preset: PresetName
    settings: HkrConfig | NearFarConfig

    def __post_init__(self) -> None:
        expected = _settings_type(self.preset)
        if not isinstance(self.settings, expected):
            raise ValueError(
                f"student {self.preset!r} takes a {expected.__name__}, got a {type(self.settings).__name__}"
            )

    def to_dict(self) -> dict[str, object]:
        """Return the settings as plain values for a manifest; ``from_dict`` reads them."""
        return {"preset": self.preset, **asdict(self.settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "StudentConfig":
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: Unknown preset, unknown or missing setting.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        name = str(values.pop("preset", None))
        missing = {item.name for item in fields(_settings_type(name))} - set(values)
        if missing:
            raise ValueError(f"student {name!r} lacks the settings {', '.join(sorted(missing))}")
        return preset(name, **values)


def preset(name: str, **overrides: object) -> StudentConfig:
    """Make the settings of a named student.

    Args:
        name: One of ``PRESETS``: ``"hkr"`` (learned kernel and landmarks) or ``"near_far"`` (training-free).
        **overrides: Fields of ``HkrConfig`` or ``NearFarConfig``.

    Raises:
        ValueError: Unknown name (the message lists them), unknown field, or a value out of range.
    """
    settings = _settings_type(name)
    known = {item.name for item in fields(settings)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"student {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    # The dataclasses check the values; their names were checked above.
    make = cast("type[HkrConfig]", settings)
    return StudentConfig(cast("PresetName", name), make(**overrides))  # type: ignore[arg-type]


def build_student(
    config: StudentConfig, heads: int, width: int, *, generator: torch.Generator | None = None
) -> StudentAttention:
    """Make the student of one layer.

    Args:
        config: Which student.
        heads: Number of heads, H.
        width: Width of a head, D.
        generator: Draws the initial weights, where there are any to draw.
    """
    if isinstance(config.settings, HkrConfig):
        return HkrStudent(config.settings, heads, width, generator=generator)
    return NearFarStudent(config.settings, heads, width)


def _settings_type(name: str) -> type[HkrConfig] | type[NearFarConfig]:
    if name == "hkr":
        return HkrConfig
    if name == "near_far":
        return NearFarConfig
    raise ValueError(f"student must be one of {', '.join(repr(item) for item in PRESETS)}, got {name!r}")
