"""Names of students and their settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Literal, cast

import torch
from attn_kernels import NearFarConfig

from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.feature_map_catalog import FeatureMaps
from ttr_distill.student.hkr import HkrConfig, HkrStudent
from ttr_distill.student.joint import JointConfig, JointStudent
from ttr_distill.student.near_far import NearFarStudent

PresetName = Literal["hkr", "hkr-joint", "near_far", "local-kernel", "hedgehog"]
Settings = HkrConfig | JointConfig | NearFarConfig

_DEFAULTS: Mapping[str, Settings] = MappingProxyType(
    {
        "hkr": HkrConfig(),
        "hkr-joint": JointConfig(
            feature_map="mlp", feature_dim=256, radius=3, landmark_fraction=0.03, landmark_minimum=15
        ),
        # At 1,024 tokens ten chosen tiles leave the worst layer of the embedded teacher at .0024, twelve at .0020.
        "near_far": NearFarConfig(top_k=14),
        "local-kernel": JointConfig(feature_map="exp", feature_dim=64, feature_hidden=32, radius=5),
        "hedgehog": JointConfig(feature_map="exp", feature_dim=64, radius=None),
    }
)
PRESETS: tuple[PresetName, ...] = ("hkr", "hkr-joint", "near_far", "local-kernel", "hedgehog")


@dataclass(frozen=True)
class StudentConfig:
    """Which student, and its settings; ``preset(name, ...)`` makes one.

    Attributes:
        preset: One of ``PRESETS``.
        settings: ``HkrConfig``, ``JointConfig`` or ``NearFarConfig``, as the preset needs.
    """

    preset: PresetName
    settings: Settings

    def __post_init__(self) -> None:
        expected = type(_defaults(self.preset))
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
        missing = {item.name for item in fields(_defaults(name))} - set(values)
        if missing:
            raise ValueError(f"student {name!r} lacks the settings {', '.join(sorted(missing))}")
        return preset(name, **values)


def preset(name: str, **overrides: object) -> StudentConfig:
    """Make the settings of a named student.

    Args:
        name: One of ``PRESETS``: ``"near_far"`` (training-free), ``"hkr"`` (learned kernel blended with landmarks),
            ``"hkr-joint"`` (the same branches and a window under one denominator), ``"local-kernel"`` (a window and a
            small learned kernel under one denominator, linear in the tokens), ``"hedgehog"`` (a learned exponential
            kernel and exact text, no window).
        **overrides: Fields of ``HkrConfig``, ``JointConfig`` or ``NearFarConfig``.

    Raises:
        ValueError: Unknown name (the message lists them), unknown field, or a value out of range.
    """
    settings = _defaults(name)
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    unknown = sorted(set(overrides) - set(values))
    if unknown:
        raise ValueError(f"student {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(values))}")
    # The dataclasses check the values; their names were checked above.
    make = cast("type[HkrConfig]", type(settings))
    return StudentConfig(cast("PresetName", name), make(**{**values, **overrides}))  # type: ignore[arg-type]


def build_student(
    config: StudentConfig,
    heads: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    feature_maps: FeatureMaps | None = None,
) -> StudentAttention:
    """Make the student of one layer.

    Args:
        config: Which student.
        heads: Number of heads, H.
        width: Width of a head, D.
        generator: Draws the initial weights, where there are any to draw.
        feature_maps: Custom feature maps for ``JointConfig.feature_map``; the built-in ones if ``None``.
    """
    settings = config.settings
    if isinstance(settings, HkrConfig):
        return HkrStudent(settings, heads, width, generator=generator)
    if isinstance(settings, JointConfig):
        return JointStudent(settings, heads, width, generator=generator, feature_maps=feature_maps)
    return NearFarStudent(settings, heads, width)


def _defaults(name: str) -> Settings:
    if name not in _DEFAULTS:
        raise ValueError(f"student must be one of {', '.join(repr(item) for item in PRESETS)}, got {name!r}")
    return _DEFAULTS[name]
