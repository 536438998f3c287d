"""What one update does: options of baseline, weighting and reward, several alternatives, several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ttr_controller.costs import AttentionCosts
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.reward import RewardConfig
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_controller.trainer import ControllerConfig, ControllerTrainer

SMALL = PolicyConfig(embed_dim=16, hidden_dim=32)
POOL = (["a", "bb", "c", "dddd"], [0, 1, 2, 3])
NAMES = (
    "loss rmse efficiency_penalty mask_mean probs_mean full_attn_ratio ttr_ratio expected_full_attn_ratio "
    "expected_ttr_ratio full_attn_eligible ttr_eligible full_attn_overall ttr_overall expected_full_attn_eligible "
    "expected_full_attn_overall expected_ttr_eligible expected_ttr_overall reward reward_quality baselined_reward "
    "reward_baseline policy_loss reinforce_total_loss efficiency_penalty_weighted lambda_eff lambda_entropy entropy "
    "entropy_bonus actual_full_attn_ratio actual_ttr_ratio actual_full_attn_ratio_overall actual_ttr_ratio_overall "
    "target_ttr_ratio target_full_attn_ratio gumbel_temperature sigma iteration latent_index width height step "
    "eligible_ttr_layers forced_full_layers sigma_aware_training steps_per_trajectory"
)


def make(config=None, damage=None, **settings):
    damage = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) if damage is None else damage
    toy = ToySampler(damage, rows=2, columns=2)
    policy = RoutingPolicy(damage.shape[1], SMALL, seed=0)
    trainer = ControllerTrainer(toy, ToyBackend(toy), policy, config, **settings)
    trainer.prepare(["a"], [0])
    return trainer


def test_a_row_has_every_name_that_charts_know():
    row = make().step(["a"], [0])
    assert set(row) >= set(NAMES.split())
    assert all(isinstance(value, float) for value in row.values())


def test_baselines_and_weights_change_the_gradient_alone():
    rows, weights = {}, {}
    for name, config in {
        "default": ControllerConfig(),
        "ema": ControllerConfig(baseline="ema"),
        "weighted": ControllerConfig(sigma_weighting=True),
    }.items():
        trainer = make(config)
        rows[name] = trainer.step(["a"], [0])
        weights[name] = trainer.policy.get_parameter("mlp.4.weight").detach().clone()
    assert len({row["reward"] for row in rows.values()}) == 1
    assert not torch.equal(weights["default"], weights["ema"])
    assert not torch.equal(weights["default"], weights["weighted"])
    # Nothing was seen before the first update: rewards are compared with 0, and all are negative.
    assert rows["ema"]["reward_baseline"] == 0.0
    assert rows["ema"]["baselined_reward"] == pytest.approx(rows["ema"]["reward"])
    assert rows["default"]["baselined_reward"] == pytest.approx(0.0, abs=1e-9)


def test_one_rollout_is_enough_for_a_running_mean():
    trainer = make(ControllerConfig(baseline="ema", rollouts=1))
    list(trainer.fit(*POOL, 4))
    assert trainer.baseline.count == 4
    with pytest.raises(ValueError, match="rollouts must be >= 2"):
        ControllerConfig(rollouts=1)


def test_the_ratio_reward_punishes_any_distance_from_the_target_share():
    trainer = make(ControllerConfig(reward=RewardConfig(shape="ratio", lambda_eff=2.0)))
    row = trainer.step(["a"], [0])
    assert row["efficiency_penalty"] > 0.0
    assert row["reward"] == pytest.approx(row["reward_quality"] - 2.0 * row["efficiency_penalty"])


def test_a_speed_up_is_a_budget_of_attention_time():
    table = torch.tensor([[4.0, 1.0], [1.0, 0.5], [1.0, 0.5]])
    trainer = make(ControllerConfig(target_speed_up=1.6), costs=AttentionCosts(("full", "student"), table))
    list(trainer.fit(*POOL, 3))
    expected = torch.sigmoid(trainer.policy.logits(trainer.contexts))
    spent = (expected * table[:, 0] + (1 - expected) * table[:, 1]).sum() / (4 * 6)
    assert spent.item() == pytest.approx(1 / 1.6, abs=1e-3)
    trainer.validate()
    assert trainer.costs.total(trainer.best.mask) <= 1 / 1.6 + 1e-6
    assert trainer.target_cost == pytest.approx(0.625)
    with pytest.raises(ValueError, match="target_speed_up must be above 1"):
        ControllerConfig(target_speed_up=1.0)


def test_among_several_alternatives_the_good_one_goes_where_it_is_needed():
    damage = torch.tensor([[1.0, 0.02, 1.0, 0.02]]).repeat(2, 1)
    toy = ToySampler(damage, rows=2, columns=2)
    costs = AttentionCosts(("full", "good", "cheap"), torch.tensor([1.0, 0.5, 0.1]).expand(4, 3))
    policy = RoutingPolicy(4, SMALL, seed=0, actions=3)
    config = ControllerConfig(target_full=0.25, learning_rate=2e-3, rollouts=8)
    backends = (ToyBackend(toy, 0.1, "good"), ToyBackend(toy, 1.0, "cheap"))
    trainer = ControllerTrainer(toy, backends, policy, config, costs=costs)
    trainer.prepare(["a"], [0])
    list(trainer.fit(["a", "bb"], [0, 1], 50))
    plan = trainer.best.mask
    assert trainer.costs.total(plan) <= trainer.target_cost + 1e-6
    needy = damage > 0.5
    cheap = torch.softmax(trainer.policy.logits(trainer.contexts), dim=2)[..., 2].detach()
    assert cheap[needy].mean() < cheap[~needy].mean() - 0.15
    assert (plan[needy] == 2).sum() < (plan[~needy] == 2).sum()
    state = trainer.state_dict()
    again = ControllerTrainer(toy, backends, RoutingPolicy(4, SMALL, seed=1, actions=3), config, costs=costs)
    again.load_state_dict(state)
    assert torch.equal(again.best.mask, plan)
    with pytest.raises(ValueError, match="2 alternatives need a policy of 3 actions"):
        ControllerTrainer(toy, backends, RoutingPolicy(4, SMALL), config)


WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_update import make, POOL
from ttr_distill.distributed import joined
with joined() as world:
    class Sink:
        rows = []
        def write(self, row):
            self.rows.append(dict(row))
    trainer = make(world=world, sinks=(Sink(),))
    rows = list(trainer.fit(*POOL, 3, batch=1))
    torch.save({{"policy": trainer.policy.state_dict(), "rows": rows, "written": Sink.rows}}, {out!r} + str(world.rank))
"""


def test_two_processes_learn_one_policy_from_their_own_prompts(tmp_path):
    code = WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path / "rank"))
    (tmp_path / "worker.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert first["rows"] == second["rows"]
    assert all(torch.equal(tensor, second["policy"][name]) for name, tensor in first["policy"].items())
    assert len(first["written"]) == 3
    assert second["written"] == []
    alone = make()
    list(alone.fit(*POOL, 3, batch=1))
    name = "mlp.0.weight"
    assert not torch.equal(alone.policy.state_dict()[name], first["policy"][name])
