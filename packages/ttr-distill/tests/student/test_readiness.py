import json
import math
from collections.abc import Callable

import pytest
from attn_dispatch import AttentionCall, LayerKey
from hypothesis import given, settings
from hypothesis import strategies as st
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker, ReadyGuard

LAYER, OTHER = LayerKey("single", 0), LayerKey("single", 1)
QUICK = ReadinessConfig(minimum_updates=0, ema_decay=0.0)


def observed(tracker: ReadinessTracker, *distances: float) -> list[str]:
    levels = []
    for distance in distances:
        tracker.observe(LAYER, distance, 2 * distance)
        tracker.flush()
        levels.append(tracker.level(LAYER))
    return levels


def test_a_level_is_left_only_above_the_exit_factor() -> None:
    levels = observed(
        ReadinessTracker(QUICK), 0.02, 0.0051, 0.005, 0.0059, 0.0061, 0.0059, 0.013, 0.0143, 0.0145, 0.013
    )
    assert levels == [
        "unready",
        "partial",
        "ready",
        "ready",
        "partial",
        "partial",
        "partial",
        "partial",
        "unready",
        "unready",
    ]


def test_enough_measurements_are_needed() -> None:
    tracker = ReadinessTracker(ReadinessConfig(minimum_updates=3))
    assert observed(tracker, 0.001, 0.001, 0.001) == ["unready", "unready", "ready"]


def test_the_moving_mean_adds_one_run_mean_at_a_time() -> None:
    tracker = ReadinessTracker(ReadinessConfig(ema_decay=0.9))
    for value in (0.1, 0.3):
        tracker.observe(LAYER, value, 10 * value)
    assert tracker[LAYER].ema_cosine is None
    tracker.flush()
    assert tracker[LAYER].ema_cosine == pytest.approx(0.2)
    tracker.observe(LAYER, 0.1, 1.0)
    tracker.flush()
    tracker.flush()
    assert tracker[LAYER].ema_cosine == pytest.approx(0.19)
    assert tracker[LAYER].ema_relative_l2 == pytest.approx(1.9)


def test_a_layer_flushes_by_itself_after_twenty_of_its_own_measurements() -> None:
    tracker = ReadinessTracker()
    for _ in range(19):
        tracker.observe(LAYER, 0.1, 0.1)
        tracker.observe(OTHER, 0.1, 0.1)
    assert tracker[LAYER].ema_cosine is None
    tracker.observe(LAYER, 0.1, 0.1)
    assert tracker[LAYER].ema_cosine == pytest.approx(0.1)
    assert tracker[OTHER].ema_cosine is None


def test_not_a_number_is_unready_and_not_for_ever() -> None:
    assert observed(ReadinessTracker(QUICK), 0.001, math.nan, 0.001, math.inf, 0.001) == [
        "ready",
        "unready",
        "ready",
        "unready",
        "ready",
    ]


def test_the_right_direction_with_the_wrong_length_is_not_ready() -> None:
    tracker = ReadinessTracker(QUICK)
    for relative_l2, level in (
        (0.95, "unready"),
        (0.3, "partial"),
        (0.19, "ready"),
        (0.21, "ready"),
        (0.23, "partial"),
    ):
        tracker.observe(LAYER, 0.001, relative_l2)
        tracker.flush()
        assert tracker.level(LAYER) == level
    tracker.observe(LAYER, 0.001, math.nan)
    tracker.flush()
    assert tracker.level(LAYER) == "unready"


def test_a_replaced_student_is_judged_anew() -> None:
    tracker = ReadinessTracker(QUICK)
    observed(tracker, 0.001)
    tracker.observe(LAYER, 0.5, 0.5)
    tracker.replace(LAYER, 0.0055, 0.1)
    tracker.flush()
    assert tracker.level(LAYER) == "partial"
    assert tracker[LAYER].ema_cosine == 0.0055


def test_guard_lets_only_ready_students_serve(make_call: Callable[..., AttentionCall]) -> None:
    tracker = ReadinessTracker(QUICK)
    strict, lenient = ReadyGuard(tracker), ReadyGuard(tracker, partial=True)
    call = make_call(0)
    assert strict(call) == "the student of this layer is not ready"
    observed(tracker, 0.01)
    assert strict(call) is not None
    assert lenient(call) is None
    observed(tracker, 0.001)
    assert strict(call) is None
    assert strict(make_call(0, layer=OTHER)) is not None
    assert strict(make_call(0, layer=None)) == "the host does not name its layers"


@given(st.lists(st.floats(0, 0.05), max_size=40), st.integers(0, 30), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_ready_always_means_a_mean_below_the_exit_limit(distances: list[float], minimum: int, decay: float) -> None:
    config = ReadinessConfig(minimum_updates=minimum, ema_decay=decay)
    tracker = ReadinessTracker(config)
    for count, distance in enumerate(distances, start=1):
        tracker.observe(LAYER, distance, 0.0)
        tracker.flush()
        if tracker.ready(LAYER):
            assert count >= minimum
            assert (tracker[LAYER].ema_cosine or 0.0) <= config.threshold * config.exit_factor
        if tracker.ready(LAYER, partial=True):
            assert (tracker[LAYER].ema_cosine or 0.0) <= config.partial_threshold * config.exit_factor


def test_state_survives_json_and_goes_on_equally() -> None:
    first = ReadinessTracker()
    for index in range(30):
        first.observe(LAYER, 0.004, 0.01 * index)
    first.observe(OTHER, math.nan, 1.0)
    first.flush()
    first.observe(LAYER, 0.003, 0.2)
    second = ReadinessTracker()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for tracker in (first, second):
        tracker.observe(LAYER, 0.002, 0.1)
        tracker.flush()
    assert second.state_dict() == first.state_dict()
    assert second.level(LAYER) == "ready"
    assert second.level(OTHER) == "unready"


def test_loading_judges_by_the_thresholds_given_now() -> None:
    loose = ReadinessTracker(ReadinessConfig(threshold=0.1, partial_threshold=0.2, minimum_updates=0))
    observed(loose, 0.05)
    assert loose.ready(LAYER)
    strict = ReadinessTracker()
    strict.load_state_dict(loose.state_dict())
    assert not strict.ready(LAYER, partial=True)


def test_images_are_asked_for_where_there_is_a_limit() -> None:
    tracker = ReadinessTracker(ReadinessConfig(minimum_updates=0, ema_decay=0.0, image_limit=0.1))
    assert observed(tracker, 0.001) == ["unready"]
    assert tracker.distance_level(LAYER) == "ready"
    for error, level in ((0.11, "unready"), (math.nan, "unready"), (math.inf, "unready"), (0.1, "ready")):
        tracker.observe_image(LAYER, error)
        assert tracker.level(LAYER) == tracker[LAYER].level == level
    assert observed(tracker, 0.5, 0.001) == ["unready", "unready"], "what became unready is measured anew"
    tracker.observe_image(LAYER, 0.05)
    assert tracker.ready(LAYER)
    tracker.replace(LAYER, 0.001, 0.01)
    assert not tracker.ready(LAYER, partial=True), "another student was never drawn with"


def test_a_saved_image_limit_holds_until_the_caller_gives_one() -> None:
    first = ReadinessTracker(ReadinessConfig(minimum_updates=0, image_limit=0.1))
    observed(first, 0.001)
    for error, level in ((None, "unready"), (0.2, "unready"), (0.05, "ready")):
        if error is not None:
            first.observe_image(LAYER, error)
        state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
        for limit, expected in ((None, level), (0.01, "unready"), (math.inf, "ready")):
            second = ReadinessTracker(ReadinessConfig(minimum_updates=0, image_limit=limit))
            second.load_state_dict(state)
            assert second.level(LAYER) == expected, (error, limit)
        again = ReadinessTracker(QUICK)
        again.load_state_dict(state)
        assert again.state_dict() == first.state_dict()


def test_a_state_saved_before_images_were_measured_is_read() -> None:
    tracker = ReadinessTracker(QUICK)
    observed(tracker, 0.001)
    state = json.loads(json.dumps(tracker.state_dict()))
    for field in ("image_error", "image_limit"):
        del state["single:0"][field]
    again = ReadinessTracker(QUICK)
    again.load_state_dict(state)
    assert again.ready(LAYER)


@pytest.mark.parametrize("entry", [{}, {"updates": 1}, 3])
def test_a_malformed_state_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="readiness of layer single:0"):
        ReadinessTracker().load_state_dict({"single:0": entry})


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold": 0.0},
        {"threshold": 0.02},
        {"exit_factor": 0.9},
        {"ema_decay": 1.0},
        {"minimum_updates": -1},
        {"flush_every": 0},
        {"image_limit": 0.0},
        {"image_limit": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        ReadinessConfig(**bad)  # type: ignore[arg-type]
