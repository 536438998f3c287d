"""More than one alternative to full attention."""

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, StepContext
from ttr_controller import guard as guards
from ttr_controller.guard import ActionGuard, PolicyGuard, ScheduleGuard, routes
from ttr_controller.rollout import trajectory_log_prob
from ttr_controller.testing import ToyBackend, ToySampler

LAYERS = tuple(LayerKey("single", index) for index in range(3))
LOGITS = torch.tensor([[0.5, -0.3, 0.0], [2.0, 1.0, 0.0], [-1.0, 0.4, 0.0]])
X = torch.zeros(1, 1, 2, 4)


def call(layer, sigma=0.7):
    return AttentionCall(X, X, X, layer=LAYERS[layer], step=StepContext(sigma, 3.0, (4, 4)))


def steps(guard, count):
    for number in range(count):
        guard(call(0, 1.0 - number / count))


@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 1.0), (0.3, 1.7)])
def test_action_frequency_is_the_softmax_of_the_decision_logits(threshold, temperature):
    guard = PolicyGuard(
        lambda step: LOGITS, LAYERS, mode="sample", threshold=threshold, temperature=temperature, seed=1
    )
    count = 4000
    steps(guard, count)
    shifted = LOGITS.clone()
    shifted[:, 0] -= torch.logit(torch.tensor(threshold))
    p = torch.softmax(shifted / temperature, dim=1).double()
    choices = guard.trajectory.choices()
    frequency = torch.stack([(choices == number).double().mean(dim=0) for number in range(3)], dim=1)
    assert ((frequency - p).abs() < 3 * (p * (1 - p) / count).sqrt()).all()
    chosen = p.expand(count, 3, 3).gather(2, choices[..., None]).log().sum()
    assert trajectory_log_prob(lambda step: LOGITS, guard.trajectory).item() == pytest.approx(chosen.item(), rel=1e-4)


def test_threshold_mode_takes_the_likeliest_and_forbidden_ones_never():
    guard = PolicyGuard(lambda step: LOGITS, LAYERS)
    steps(guard, 1)
    assert guard.trajectory.actions == ((0, 0, 1),)
    allowed = torch.tensor([[True, True, True], [False, False, True], [True, False, False]])
    guard = PolicyGuard(lambda step: LOGITS, LAYERS, mode="sample", eligible=allowed, seed=0)
    steps(guard, 200)
    choices = guard.trajectory.choices()
    assert set(choices[:, 1].tolist()) == {0, 2}
    assert set(choices[:, 2].tolist()) == {0}
    assert guard(call(2)) == guards.NOT_ELIGIBLE
    # One permission per layer stands for all alternatives.
    guard = PolicyGuard(lambda step: LOGITS, LAYERS, mode="sample", eligible=torch.tensor([True, False, True]), seed=0)
    steps(guard, 100)
    assert [len(set(guard.trajectory.choices()[:, i].tolist())) for i in range(3)] == [3, 1, 3]


def test_routes_send_every_call_to_the_attention_chosen():
    toy = ToySampler(torch.full((3, 2), 0.5), rows=2, columns=2)
    plan = torch.tensor([[0, 1], [2, 2], [1, 0]])
    backends = (ToyBackend(toy, name="good", scale=0.1), ToyBackend(toy, name="cheap"))
    guard = ScheduleGuard(plan, toy.layers)
    router = AttentionRouter(routes(guard, backends))
    for _ in range(2):
        router.report.clear()
        toy.sample(["a"], [0], router)
        ran = {(row.sigma, row.layer): row.ran for row in router.report.rows()}
        names = [[ran[context.sigma, layer] for layer in toy.layers] for context in toy.contexts()]
        assert names == [["native", "good"], ["cheap", "cheap"], ["good", "native"]]
    reasons = router.report.declines()
    assert reasons[guards.OTHER_CHOSEN] > 0
    assert reasons[guards.FULL_BY_SCHEDULE] == 4
    with pytest.raises(ValueError, match="numbered from 1"):
        ActionGuard(guard, 0)


def test_a_seeded_guard_repeats_itself_run_by_run_and_tells_each_step_once():
    told = []
    guard = PolicyGuard(
        lambda step: LOGITS,
        LAYERS,
        mode="sample",
        seed=7,
        on_step=lambda step, choices: told.append((step.sigma, choices)),
    )
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))
        guard.begin_run()
        for sigma in (0.9, 0.5, 0.1):
            for layer in range(3):
                guard.action(2)(call(layer, sigma))
        runs.append(guard.trajectory.actions)
    assert runs[0] == runs[1]
    assert told == [(sigma, choices) for sigma, choices in zip((0.9, 0.5, 0.1), runs[0], strict=True)] * 2
    other = PolicyGuard(lambda step: LOGITS, LAYERS, mode="sample", seed=8)
    steps(other, 10)
    again = PolicyGuard(lambda step: LOGITS, LAYERS, mode="sample", seed=7)
    steps(again, 10)
    assert other.trajectory.actions != again.trajectory.actions


def test_permissions_of_another_number_of_attentions_are_named():
    guard = PolicyGuard(lambda step: LOGITS, LAYERS, eligible=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="eligible has 4 attentions, the policy 3"):
        guard(call(0))
    with pytest.raises(ValueError, match=r"eligible must be bool \[3\] or \[3, A\]"):
        PolicyGuard(lambda step: LOGITS, LAYERS, eligible=torch.ones(2, 3, dtype=torch.bool))
