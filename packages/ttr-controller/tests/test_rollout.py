import math

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext
from ttr_controller.rollout import (
    ContextRecorder,
    Sampler,
    Trajectory,
    VelocityModel,
    decision_logits,
    step_key,
    trajectory_log_prob,
    trajectory_logits,
)
from ttr_controller.testing import ToySampler

STEPS = tuple(StepContext(sigma, 3.0, (4, 4)) for sigma in (1.0, 0.6, 0.3))
TABLE = torch.tensor([[0.5, -1.0], [2.0, 0.1], [-0.7, 3.0]], dtype=torch.float64)


def table_policy(step):
    return TABLE[STEPS.index(step)]


def test_threshold_is_the_point_of_even_odds():
    for threshold in (0.1, 0.5, 0.9):
        logit = torch.tensor([math.log(threshold / (1 - threshold))], dtype=torch.float64)
        assert decision_logits(logit, threshold, 0.7).abs().item() < 1e-12


def test_temperature_spreads_or_sharpens_the_odds():
    logits = torch.tensor([1.2, -0.4])
    torch.testing.assert_close(decision_logits(logits, 0.5, 2.0), logits / 2)
    p = torch.sigmoid(decision_logits(logits, 0.5, 1e-3))
    torch.testing.assert_close(p, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("threshold", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 0.0), (0.5, math.nan)])
def test_settings_out_of_range_raise(threshold, temperature):
    with pytest.raises(ValueError, match="must"):
        decision_logits(torch.zeros(1), threshold, temperature)


def test_log_prob_uses_the_recorded_steps_threshold_and_temperature():
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    actions = tuple(tuple(row) for row in (~mask).long().tolist())
    trajectory = Trajectory(STEPS, actions, threshold=0.3, temperature=1.7)
    p = torch.sigmoid((TABLE - math.log(0.3 / 0.7)) / 1.7)
    expected = torch.where(mask, p, 1 - p).log()
    assert trajectory_log_prob(table_policy, trajectory).item() == pytest.approx(expected.sum().item())
    eligible = torch.tensor([False, True])
    assert trajectory_log_prob(table_policy, trajectory, eligible).item() == pytest.approx(expected[:, 1].sum().item())


def test_an_empty_trajectory_is_an_error():
    with pytest.raises(ValueError, match="never asked"):
        trajectory_logits(table_policy, Trajectory((), ()))


def test_both_halves_of_a_guided_step_are_one_step():
    conditional, unconditional = StepContext(0.5, 3.0, (4, 4), (0,)), StepContext(0.5, 3.0, (4, 4), (1,))
    assert step_key(conditional) == step_key(unconditional) == StepContext(0.5, 3.0, (4, 4))
    assert step_key(conditional) != step_key(StepContext(0.4, 3.0, (4, 4), (0,)))


def test_recorder_notes_steps_in_order_and_answers_exactly():
    recorder = ContextRecorder()
    q = torch.zeros(1, 1, 2, 4)
    recorder.begin_run()
    for step in (STEPS[0], STEPS[0], STEPS[2], None):
        answer = recorder(AttentionCall(q, q, q, layer=LayerKey("a", 0), step=step), lambda call: call.v + 1)
        assert torch.equal(answer, q + 1)
    recorder.end_run()
    assert recorder.contexts == (STEPS[0], STEPS[2])
    recorder.begin_run()
    assert recorder.contexts == ()


def test_the_toy_is_a_sampler_and_a_velocity_model():
    toy = ToySampler(torch.ones(2, 2))
    assert isinstance(toy, Sampler)
    assert isinstance(toy, VelocityModel)


def test_the_tiny_teachers_sampler_is_one_too():
    tiny = pytest.importorskip("ttr_distill.tiny", exc_type=ImportError)
    for name in ("sample", "trajectory", "velocity", "layers"):
        assert hasattr(tiny.TinySampler, name)
