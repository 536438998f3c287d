import pytest
import torch
from ttr_controller import budget, probe
from ttr_controller.guard import masks_from_policy
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.reward import RewardConfig
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_controller.trainer import ControllerConfig, ControllerTrainer

SMALL = PolicyConfig(embed_dim=16, hidden_dim=32)


def toy_trainer(damage, config=None, *, growth=0.0, policy_seed=0, **settings):
    toy = ToySampler(damage, rows=2, columns=2, growth=growth)
    policy = RoutingPolicy(damage.shape[1], SMALL, seed=policy_seed)
    trainer = ControllerTrainer(toy, ToyBackend(toy), policy, config, **settings)
    trainer.prepare(["a"], [0])
    return trainer, toy


def probabilities(trainer):
    return torch.sigmoid(trainer.policy.logits(trainer.contexts)).detach()


def test_the_known_best_subset_is_found():
    damage = torch.full((2, 4), 0.05)
    best = torch.tensor([[True, False, False, True], [False, True, False, True]])
    damage[best] = 1.0
    trainer, _ = toy_trainer(damage, ControllerConfig(learning_rate=1e-3))
    rows = list(trainer.fit(["a", "bb"], [0, 1], 250))
    assert torch.equal(trainer.best.mask, best)
    for policy in (trainer.best_policy(), trainer.policy):
        assert torch.equal(masks_from_policy(policy, trainer.contexts, 4), best)
    p = probabilities(trainer)
    assert p[best].min() > 0.6
    assert p[~best].max() < 0.4
    late = sum(row["loss"] for row in rows[-20:]) / 20
    assert late < 0.5 * rows[0]["loss"]


def test_constant_reward_leaves_every_probability_where_it_is():
    config = ControllerConfig(learning_rate=1e-3, rollouts=2, entropy_weight=0.0, reward=RewardConfig(lambda_eff=0.0))
    trainer, _ = toy_trainer(torch.zeros(1, 3), config)
    trainer.calibrate()
    before = probabilities(trainer)
    for _ in trainer.fit(["a"], [0], 600):
        pass
    assert (probabilities(trainer) - before).abs().max() < 0.02


def test_expected_share_stays_at_the_target():
    damage = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    eligible = torch.tensor([True, True, False, True])
    trainer, _ = toy_trainer(damage, ControllerConfig(target_full=0.3, learning_rate=3e-3), eligible=eligible)
    for row in trainer.fit(["a"], [0], 20):
        assert probabilities(trainer)[:, eligible].mean().item() == pytest.approx(0.3, abs=1e-3)
        assert row["target_full_attn_ratio"] == 0.3
    assert trainer.full_slots == 3


def test_ineligible_layers_are_full_and_out_of_reward_and_gradient():
    damage = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    damage[:, 2] = 100.0
    eligible = torch.tensor([True, True, False, True])
    trainer, _ = toy_trainer(damage, eligible=eligible, config=ControllerConfig(entropy_weight=0.1))
    weights = trainer.policy.get_parameter("mlp.4.weight")
    before = weights.detach().clone()
    row = trainer.step(["a"], [0])
    assert row["loss"] < 2.0
    assert torch.equal(weights[2], before[2])
    assert not torch.equal(weights[0], before[0])
    trainer.validate()
    assert trainer.best.mask[:, 2].all()
    assert int(trainer.best.mask[:, eligible].sum()) == trainer.full_slots


def test_learning_never_ends_worse_than_the_probe():
    damage = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) ** 2
    config = ControllerConfig(learning_rate=0.1, validate_every=1)
    trainer, toy = toy_trainer(damage, config, growth=4.0)
    scores = probe.velocity_error_probe(toy, ["a"], [0], trainer.judge.backend)
    assert trainer.initialise_from_probe(scores) < 0.1
    from_probe = trainer.validation_error(budget.top_k_mask(scores, trainer.full_slots))
    assert trainer.best.error == pytest.approx(from_probe)
    found = [row["best_error"] for row in trainer.fit(["a", "bb"], [0, 1], 12)]
    assert all(error <= from_probe for error in found)
    assert found == sorted(found, reverse=True)
    mask = masks_from_policy(trainer.best_policy(), trainer.contexts, trainer.full_slots)
    assert torch.equal(mask, trainer.best.mask)
    assert toy.expected_error(mask, "a", 0) == pytest.approx(trainer.best.error, rel=1e-4)


def test_equal_seeds_give_equal_training_and_others_do_not():
    damage = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))

    def run(seed):
        torch.manual_seed(seed + 99)
        trainer, _ = toy_trainer(damage, seed=seed)
        return [row["loss"] for row in trainer.fit(["a", "bb", "c"], [0, 1, 2], 5, batch=2)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_update_works_inside_inference_mode():
    with torch.inference_mode():
        trainer, _ = toy_trainer(torch.rand(2, 2, generator=torch.Generator().manual_seed(0)))
        before = trainer.policy.get_parameter("mlp.0.weight").clone()
        trainer.step(["a"], [0])
        assert not torch.equal(before, trainer.policy.get_parameter("mlp.0.weight"))
        trainer.validate()
    trainer.step(["a"], [0])


def test_stopping_between_rollouts_changes_nothing():
    damage = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    broken, _ = toy_trainer(damage)
    whole, _ = toy_trainer(damage)
    asked = []

    def stop_in_the_second_update():
        asked.append(1)
        return len(asked) == 6

    first = list(broken.fit(["a", "bb"], [0, 1], 3, should_stop=stop_in_the_second_update))
    assert len(first) == 1
    assert broken.updates == 1
    rest = list(broken.fit(["a", "bb"], [0, 1], 3))
    assert first + rest == list(whole.fit(["a", "bb"], [0, 1], 3))


def test_metrics_reach_the_sinks():
    class Sink:
        def __init__(self):
            self.rows = []

        def write(self, row):
            self.rows.append(row)

    sink = Sink()
    trainer, _ = toy_trainer(torch.ones(2, 2), sinks=(sink,), student_cost=torch.tensor([0.25, 0.25]))
    rows = list(trainer.fit(["a"], [0], 2))
    assert sink.rows == rows
    assert [row["step"] for row in rows] == [1.0, 2.0]
    assert {"loss", "rmse", "reward", "entropy", "actual_full_attn_ratio", "best_error"} <= set(rows[0])


def test_wrong_settings_are_named():
    toy = ToySampler(torch.ones(2, 3))
    with pytest.raises(ValueError, match="policy has 2 layers, the sampler 3"):
        ControllerTrainer(toy, ToyBackend(toy), RoutingPolicy(2, SMALL))
    with pytest.raises(ValueError, match="at least one ready layer"):
        ControllerTrainer(toy, ToyBackend(toy), RoutingPolicy(3, SMALL), eligible=torch.zeros(3, dtype=torch.bool))
    trainer = ControllerTrainer(toy, ToyBackend(toy), RoutingPolicy(3, SMALL))
    with pytest.raises(ValueError, match="call prepare"):
        trainer.validate()
    with pytest.raises(ValueError, match="no policy was validated"):
        trainer.best_policy()
    with pytest.raises(ValueError, match="batch of 3"):
        next(trainer.fit(["a"], [0], 1, batch=3))
    with pytest.raises(ValueError, match="target_full"):
        ControllerConfig(target_full=1.0)
    with pytest.raises(ValueError, match="rollouts must be >= 2"):
        ControllerConfig(rollouts=1)
