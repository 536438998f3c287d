"""Which students are good enough to serve, judged on queries they were never trained on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from attn_dispatch import AttentionCall, LayerKey

Level = Literal["unready", "partial", "ready"]

_L2_TO_COSINE = 8.0
"""A squared relative L2 distance above this multiple of the cosine limit is too much as well.

For a student of the right length it is about twice the cosine distance. A student of the wrong length can have none.
"""

_LATER = frozenset({"image_error", "image_limit"})
"""Fields that the state of a layer may lack: it was saved before they were there."""


@dataclass(frozen=True)
class ReadinessConfig:
    """When a student may serve.

    Thresholds are cosine distances. The squared relative L2 distance may be at most eight times as large, which only a
    student whose answers have the wrong length exceeds.

    The whole-image error of serving every layer grows with the square root of the mean cosine distance (measured on
    the embedded teacher: about 3.4 to 4.3 times it), hence the small thresholds.

    Attributes:
        threshold: Mean cosine distance up to which a student may serve any share of the calls.
        partial_threshold: Distance up to which it may serve up to three quarters of them.
        exit_factor: A student loses its level only above ``exit_factor`` times the threshold.
        minimum_updates: Held-out measurements before a student can be ready.
        ema_decay: Weight of the past when a flush adds the mean of the new measurements.
        flush_every: Measurements of one layer after which it flushes without waiting for the end of the run.
        image_limit: A student serves only if an image drawn with it was measured, too, and lies no farther from the
            exact one than this (relative L2 distance of the latents; see ``gate_on_images``). ``None`` = the limit
            under which saved students were measured, if there was one, else images are not asked for; ``inf`` = they
            are not asked for, whatever was saved.
    """

    threshold: float = 0.005
    partial_threshold: float = 0.012
    exit_factor: float = 1.2
    minimum_updates: int = 24
    ema_decay: float = 0.9
    flush_every: int = 20
    image_limit: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= self.partial_threshold < math.inf:
            raise ValueError(
                f"need 0 < threshold <= partial_threshold, got {self.threshold} and {self.partial_threshold}"
            )
        if not 1.0 <= self.exit_factor < math.inf:
            raise ValueError(f"exit_factor must be at least 1, got {self.exit_factor}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.minimum_updates < 0 or self.flush_every < 1:
            raise ValueError(
                f"need minimum_updates >= 0 and flush_every >= 1, got {self.minimum_updates} and {self.flush_every}"
            )
        if self.image_limit is not None and not self.image_limit > 0.0:
            raise ValueError(f"image_limit must be positive or None, got {self.image_limit}")


@dataclass
class LayerReadiness:
    """What is known of one layer.

    Attributes:
        updates: Held-out measurements so far.
        ema_cosine: Moving mean of the cosine distance; ``None`` before the first flush.
        ema_relative_l2: Moving mean of the relative L2 distance.
        level: ``"unready"``, ``"partial"`` or ``"ready"``.
        pending: ``(cosine, relative_l2)`` measured since the last flush.
        image_error: How far an image lies from the exact one when this student serves with all that are closer to the
            teacher than it; ``None`` = not measured since the student was exchanged or unready.
        image_limit: Largest ``image_error`` with which the student serves, of a saved state; ``None`` = any.
    """

    updates: int = 0
    ema_cosine: float | None = None
    ema_relative_l2: float | None = None
    level: Level = "unready"
    pending: list[tuple[float, float]] = field(default_factory=list)
    image_error: float | None = None
    image_limit: float | None = None


class ReadinessTracker:
    """Keeps a moving mean of held-out distances per layer and decides, with hysteresis, who is ready.

    Args:
        config: Thresholds.
    """

    def __init__(self, config: ReadinessConfig | None = None) -> None:
        self.config = config or ReadinessConfig()
        self._layers: dict[LayerKey, LayerReadiness] = {}

    def observe(self, layer: LayerKey, cosine: float, relative_l2: float) -> None:
        """Add one measurement on held-out queries; it counts at the next flush.

        Args:
            layer: Which layer.
            cosine: Mean cosine distance to the teacher, 0 to 2.
            relative_l2: Relative L2 distance to the teacher.
        """
        state = self._layers.setdefault(layer, LayerReadiness())
        state.pending.append((float(cosine), float(relative_l2)))
        state.updates += 1
        if len(state.pending) >= self.config.flush_every:
            self._flush(state)

    def flush(self) -> None:
        """Fold the mean of the new measurements of every layer into its moving mean; call it once per run."""
        for state in self._layers.values():
            self._flush(state)

    def replace(self, layer: LayerKey, cosine: float, relative_l2: float) -> None:
        """Start the moving mean anew: the student of the layer was exchanged for one with these distances."""
        state = self._layers.setdefault(layer, LayerReadiness())
        state.pending.clear()
        state.ema_cosine, state.ema_relative_l2 = float(cosine), float(relative_l2)
        state.level = "unready"
        state.image_error = None
        self._refresh(state)

    def observe_image(self, layer: LayerKey, error: float) -> None:
        """Take over how far an image drawn with the student of a layer lies from the exact one.

        Args:
            layer: Which layer.
            error: Relative L2 distance of the latents.
        """
        state = self._layers.setdefault(layer, LayerReadiness())
        state.image_error = float(error)
        self._refresh(state)

    def level(self, layer: LayerKey) -> Level:
        """Return how far the layer may serve; a layer never measured is ``"unready"``."""
        return "unready" if self.image_refusal(layer) is not None else self.distance_level(layer)

    def distance_level(self, layer: LayerKey) -> Level:
        """Return how far the layer may serve by its held-out distances alone."""
        state = self._layers.get(layer)
        return "unready" if state is None else state.level

    def image_refusal(self, layer: LayerKey) -> str | None:
        """Say why images keep the layer from serving; ``None`` if they do not, or are not asked for."""
        state = self._layers.get(layer, LayerReadiness())
        limit = self._image_limit(state)
        if limit is None or limit == math.inf:
            return None
        if state.image_error is None:
            return "no image drawn with the student of this layer was measured"
        # Not the other way round: a comparison with NaN is false.
        if state.image_error <= limit:
            return None
        return "an image drawn with the student of this layer was too far from the exact one"

    def ready(self, layer: LayerKey, *, partial: bool = False) -> bool:
        """Return whether the layer may serve; with ``partial`` the weaker level is enough."""
        level = self.level(layer)
        return level == "ready" or (partial and level == "partial")

    def layers(self) -> tuple[LayerKey, ...]:
        """Return the layers measured so far."""
        return tuple(sorted(self._layers))

    def __getitem__(self, layer: LayerKey) -> LayerReadiness:
        """Return what is known of a layer, with the level that it may serve at."""
        return replace(self._layers.get(layer, LayerReadiness()), level=self.level(layer))

    def state_dict(self) -> dict[str, object]:
        """Return everything but the settings as JSON values."""
        return {
            str(layer): {
                "updates": state.updates,
                "ema_cosine": _to_json(state.ema_cosine),
                "ema_relative_l2": _to_json(state.ema_relative_l2),
                "level": state.level,
                "pending": [[_to_json(cosine), _to_json(l2)] for cosine, l2 in state.pending],
                "image_error": _to_json(state.image_error),
                "image_limit": _to_json(self._image_limit(state)),
            }
            for layer, state in sorted(self._layers.items())
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Replace everything by what ``state_dict`` gave; levels are judged anew by this tracker's thresholds.

        Raises:
            ValueError: The state is not one of a tracker.
        """
        layers: dict[LayerKey, LayerReadiness] = {}
        for name, entry in state.items():
            known = set(LayerReadiness.__dataclass_fields__)
            if not isinstance(entry, Mapping) or not known - _LATER <= set(entry) <= known:
                raise ValueError(f"readiness of layer {name} does not have the known fields: {entry}")
            one = LayerReadiness(
                updates=int(entry["updates"]),
                ema_cosine=_from_json(entry["ema_cosine"]),
                ema_relative_l2=_from_json(entry["ema_relative_l2"]),
                level=entry["level"],
                pending=[(_number(cosine), _number(l2)) for cosine, l2 in entry["pending"]],
                image_error=_from_json(entry.get("image_error")),
                image_limit=_from_json(entry.get("image_limit")),
            )
            self._refresh(one)
            layers[LayerKey.parse(name)] = one
        self._layers = layers

    def _flush(self, state: LayerReadiness) -> None:
        if not state.pending:
            return
        cosine = sum(pair[0] for pair in state.pending) / len(state.pending)
        relative_l2 = sum(pair[1] for pair in state.pending) / len(state.pending)
        state.pending.clear()
        state.ema_cosine = self._mixed(state.ema_cosine, cosine)
        state.ema_relative_l2 = self._mixed(state.ema_relative_l2, relative_l2)
        self._refresh(state)

    def _mixed(self, past: float | None, new: float) -> float:
        # A past that is not finite would stay so for ever; one sane run mean is better evidence than that.
        if past is None or not math.isfinite(past):
            return new
        return self.config.ema_decay * past + (1.0 - self.config.ema_decay) * new

    def _refresh(self, state: LayerReadiness) -> None:
        if state.updates < self.config.minimum_updates:
            state.level = "unready"
        elif self._within(state, self.config.threshold, held=state.level == "ready"):
            state.level = "ready"
        elif self._within(state, self.config.partial_threshold, held=state.level != "unready"):
            state.level = "partial"
        else:
            state.level = "unready"
        if state.level == "unready":
            # What learns again until it is ready once more has to be measured once more.
            state.image_error = None

    def _image_limit(self, state: LayerReadiness) -> float | None:
        return state.image_limit if self.config.image_limit is None else self.config.image_limit

    def _within(self, state: LayerReadiness, limit: float, *, held: bool) -> bool:
        if state.ema_cosine is None or state.ema_relative_l2 is None:
            return False
        allowed = limit * (self.config.exit_factor if held else 1.0)
        # Comparisons with NaN are false: a student that answers NaN is unready.
        return state.ema_cosine <= allowed and state.ema_relative_l2**2 <= _L2_TO_COSINE * allowed


class ReadyGuard:
    """A guard for a router: lets only ready students serve.

    Args:
        readiness: Who is ready; asked at every call.
        partial: The weaker level is enough, for schedules that serve at most three quarters of the calls.
    """

    def __init__(self, readiness: ReadinessTracker, *, partial: bool = False) -> None:
        self.readiness = readiness
        self.partial = partial

    def __call__(self, call: AttentionCall) -> str | None:
        """Return ``None`` if the layer's student is ready, else the reason."""
        if call.layer is None:
            return "the host does not name its layers"
        if self.readiness.ready(call.layer, partial=self.partial):
            return None
        if self.readiness.distance_level(call.layer) != "unready":
            refusal = self.readiness.image_refusal(call.layer)
            if refusal is not None:
                return refusal
        return "the student of this layer is not ready"


def _to_json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _from_json(value: object) -> float | None:
    return None if value is None else _number(value)


def _number(value: object) -> float:
    if isinstance(value, int | float | str):
        return float(value)
    raise ValueError(f"expected a number, got {value!r}")
