import math

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, Route, StepContext
from ttr_controller import guard as guards
from ttr_controller.guard import PolicyGuard, ScheduleGuard, masks_from_policy, threshold_from_quality_speed
from ttr_controller.policy import RoutingPolicy
from ttr_controller.rollout import trajectory_log_prob
from ttr_controller.testing import ToyBackend, ToySampler

LAYERS = tuple(LayerKey("single", index) for index in range(4))
LOGITS = torch.tensor([-1.5, 0.0, 0.8, 2.5])
STEP = StepContext(0.7, 3.0, (4, 4))
X = torch.zeros(1, 1, 2, 4)


def call(layer=0, step=STEP):
    return AttentionCall(X, X, X, layer=LAYERS[layer] if isinstance(layer, int) else layer, step=step)


def ask_all(guard, step=STEP):
    return [guard(call(layer, step)) is not None for layer in range(4)]


def steps(count):
    return [StepContext(1.0 - i / count, 3.0, (4, 4)) for i in range(count)]


@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 1.0), (0.5, 2.5), (0.3, 0.6)])
def test_action_frequency_is_the_sigmoid_of_the_decision_logits(threshold, temperature):
    guard = PolicyGuard(
        lambda step: LOGITS,
        LAYERS,
        mode="sample",
        threshold=threshold,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    count = 4000
    for step in steps(count):
        guard(call(0, step))
    frequency = guard.trajectory.mask().double().mean(dim=0)
    p = torch.sigmoid((LOGITS - math.log(threshold / (1 - threshold))) / temperature).double()
    assert ((frequency - p).abs() < 3 * (p * (1 - p) / count).sqrt()).all()


def test_score_function_has_zero_mean():
    """Actions come from the distribution that is scored, so any constant reward leaves the policy where it is."""
    logits = LOGITS.clone().requires_grad_()
    guard = PolicyGuard(lambda step: logits, LAYERS, mode="sample", generator=torch.Generator().manual_seed(1))
    count = 4000
    for step in steps(count):
        guard(call(0, step))
    log_prob = trajectory_log_prob(lambda step: logits, guard.trajectory)
    (gradient,) = torch.autograd.grad(log_prob / count, logits)
    p = torch.sigmoid(LOGITS)
    assert (gradient.abs() < 3 * (p * (1 - p) / count).sqrt()).all()


def test_one_mask_per_step_kept_for_all_layers_and_redrawn_in_the_next_run():
    asked = []

    def policy(step):
        asked.append(step)
        return torch.zeros(4)

    guard = PolicyGuard(policy, LAYERS, mode="sample", generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(12):
        guard.begin_run()
        first = ask_all(guard)
        other = ask_all(guard, StepContext(0.3, 3.0, (4, 4)))
        assert ask_all(guard) == first
        assert guard.trajectory.mask().tolist() == [first, other]
        guard.end_run()
        assert len(guard.trajectory.contexts) == 2
        runs.append(tuple(first))
    assert len(asked) == 24
    assert len(set(runs)) > 3


def test_both_halves_of_a_guided_step_share_a_mask():
    guard = PolicyGuard(lambda step: torch.zeros(4), LAYERS, mode="sample", generator=torch.Generator().manual_seed(0))
    halves = [ask_all(guard, StepContext(0.7, 3.0, (4, 4), part)) for part in ((0,), (1,), (0, 1))]
    assert halves[0] == halves[1] == halves[2]


def test_acting_is_scored_with_the_inputs_seen_while_acting():
    policy = RoutingPolicy(4, seed=0)
    policy.shift(0.3)
    guard = PolicyGuard(policy, LAYERS, mode="sample", temperature=1.5, generator=torch.Generator().manual_seed(0))
    contexts = [StepContext(s, 2.0 + s, (8, 6), (0, 1)) for s in (0.9, 0.5, 0.1)]
    acted = 0.0
    with torch.inference_mode():
        for context in contexts:
            full = torch.tensor(ask_all(guard, context))
            p = torch.sigmoid(policy(context) / 1.5)
            acted += torch.where(full, p, 1 - p).log().sum().item()
    assert trajectory_log_prob(policy, guard.trajectory).item() == pytest.approx(acted, rel=1e-5)


def test_threshold_mode_is_full_above_the_threshold():
    p = torch.sigmoid(LOGITS)
    for threshold in (0.1, 0.5, 0.6, 0.9):
        guard = PolicyGuard(lambda step: LOGITS, LAYERS, mode="threshold", threshold=threshold)
        assert ask_all(guard) == (p > threshold).tolist()


def test_quality_speed_maps_to_thresholds():
    assert [threshold_from_quality_speed(x) for x in (-1.0, 0.0, 0.5, 1.0, 7.0)] == pytest.approx(
        [0.1, 0.1, 0.5, 0.9, 0.9]
    )


@pytest.mark.parametrize("mode", ["sample", "threshold", "table"])
def test_ineligible_layers_are_always_full(mode):
    eligible = torch.tensor([True, False, True, False])
    guard = PolicyGuard(
        lambda step: torch.full((4,), -30.0),
        LAYERS,
        mode=mode,
        eligible=eligible,
        generator=torch.Generator().manual_seed(0),
        table={STEP: torch.zeros(4, dtype=torch.bool)},
    )
    for _ in range(5):
        guard.begin_run()
        assert ask_all(guard) == [False, True, False, True]
        assert guard.trajectory.mask().tolist() == [[False, True, False, True]]
    assert guard(call(1)) == guards.NOT_ELIGIBLE


def test_table_mode_follows_its_masks_and_is_full_elsewhere():
    mask = torch.tensor([True, False, False, True])
    guard = PolicyGuard(lambda step: LOGITS, LAYERS, mode="table", table={StepContext(0.7, 3.0, (4, 4), (0, 1)): mask})
    assert ask_all(guard) == mask.tolist()
    assert guard(call(0)) == guards.FULL_BY_POLICY
    assert guard(call(1, StepContext(0.2))) == guards.NOT_PLANNED


def test_seed_fixes_the_actions():
    def actions(seed):
        guard = PolicyGuard(lambda step: LOGITS, LAYERS, mode="sample", generator=torch.Generator().manual_seed(seed))
        return [tuple(ask_all(guard, step)) for step in steps(20)]

    torch.manual_seed(0)
    first = actions(5)
    torch.manual_seed(1)
    assert actions(5) == first
    assert actions(6) != first


def test_unknown_layers_and_steps_are_full_and_say_so():
    for guard in (
        PolicyGuard(lambda step: LOGITS, LAYERS),
        ScheduleGuard(torch.zeros(1, 4, dtype=torch.bool), LAYERS),
    ):
        assert guard(call(LayerKey("double", 0))) == guards.UNKNOWN_LAYER
        assert guard(AttentionCall(X, X, X, step=STEP)) == guards.UNKNOWN_LAYER
        assert guard(call(0, None)) == guards.UNKNOWN_STEP


def test_schedule_follows_the_order_of_steps_in_each_run():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    guard = ScheduleGuard(mask, LAYERS)
    for _ in range(2):
        guard.begin_run()
        assert ask_all(guard, StepContext(0.9, cond_or_uncond=(0,))) == mask[0].tolist()
        assert ask_all(guard, StepContext(0.9, cond_or_uncond=(1,))) == mask[0].tolist()
        assert ask_all(guard, StepContext(0.4)) == mask[1].tolist()
        assert guard(call(1, StepContext(0.1))) == guards.NOT_PLANNED
        guard.end_run()


def test_masks_from_policy_have_the_exact_count_and_serve_through_a_router():
    toy = ToySampler(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))
    policy = RoutingPolicy(3, seed=0)
    eligible = torch.tensor([True, True, False])
    mask = masks_from_policy(policy, toy.contexts(), 4, eligible=eligible)
    assert int(mask[:, :2].sum()) == 4
    assert mask[:, 2].all()
    logits = policy.logits(toy.contexts())[:, :2]
    assert logits[mask[:, :2]].min() > logits[~mask[:, :2]].max()
    router = AttentionRouter((Route(ToyBackend(toy), (ScheduleGuard(mask, toy.layers),)),))
    toy.sample(["a"], [0], router)
    served = sum(row.count for row in router.report.rows() if row.ran == "student")
    assert served == int((~mask).sum())
    with pytest.raises(ValueError, match="ContextRecorder"):
        masks_from_policy(policy, [], 0)


def test_wrong_settings_are_named():
    policy = RoutingPolicy(4, seed=0)
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        PolicyGuard(policy, LAYERS, mode="sample")
    with pytest.raises(ValueError, match="mode must be"):
        PolicyGuard(policy, LAYERS, mode="gumbel")
    with pytest.raises(ValueError, match="needs a table"):
        PolicyGuard(policy, LAYERS, mode="table")
    with pytest.raises(ValueError, match="given once each"):
        PolicyGuard(policy, (*LAYERS, LAYERS[0]))
    with pytest.raises(ValueError, match=r"bool tensor \[4\]"):
        PolicyGuard(policy, LAYERS, eligible=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="logits for 3 layers"):
        PolicyGuard(policy, LAYERS[:3])(call(0))
    with pytest.raises(ValueError, match=r"mask must be bool \[steps, 4\]"):
        ScheduleGuard(torch.zeros(2, 4), LAYERS)
