import json

import pytest
import torch
from attn_dispatch import StepContext
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_controller.trainer import ControllerConfig, ControllerTrainer
from ttr_controller.trainer_state import pack_contexts, unpack_contexts

DAMAGE = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
POOL = (["a", "bb", "c"], [0, 1, 2])


def make(seed=0, target=0.5, layers=3, eligible=None):
    toy = ToySampler(DAMAGE[:, :layers], rows=2, columns=2)
    policy = RoutingPolicy(layers, PolicyConfig(embed_dim=16, hidden_dim=32), seed=0)
    config = ControllerConfig(target_full=target, validate_every=2)
    return ControllerTrainer(toy, ToyBackend(toy), policy, config, seed=seed, eligible=eligible)


def test_a_resumed_training_equals_an_unbroken_one():
    whole = make()
    whole.prepare(*POOL)
    rows = list(whole.fit(*POOL, 6))

    broken = make()
    broken.prepare(*POOL)
    first = list(broken.fit(*POOL, 3))
    state = broken.state_dict()
    state = {"tensors": state["tensors"], "manifest": json.loads(json.dumps(state["manifest"]))}
    resumed = make()
    resumed.load_state_dict(state)
    assert first + list(resumed.fit(*POOL, 6)) == rows
    for name, tensor in whole.state_dict()["tensors"].items():
        assert torch.equal(tensor, resumed.state_dict()["tensors"][name]), name
    assert resumed.state_dict()["manifest"] == whole.state_dict()["manifest"]


def test_a_state_is_a_copy():
    trainer = make()
    trainer.prepare(*POOL)
    list(trainer.fit(*POOL, 1))
    state = trainer.state_dict()
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    list(trainer.fit(*POOL, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in state["tensors"].items())


def test_the_best_candidate_belongs_to_its_target():
    trainer = make()
    trainer.prepare(*POOL)
    list(trainer.fit(*POOL, 2))
    state = trainer.state_dict()
    same, other = make(), make(target=0.25)
    same.load_state_dict(state)
    other.load_state_dict(state)
    assert same.best.error == trainer.best.error
    assert torch.equal(same.best.mask, trainer.best.mask)
    assert other.best.error == float("inf")
    assert other.updates == 2


def test_another_training_is_refused():
    trainer = make()
    trainer.prepare(*POOL)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match=r"layers: \['toy:0', 'toy:1'\] here, \['toy:0', .* there"):
        make(layers=2).load_state_dict(state)
    wider = {**state["manifest"], "policy": {**state["manifest"]["policy"], "hidden_dim": 4096}}
    with pytest.raises(ValueError, match=r"changed setting \(hidden_dim: \d+ here, 4096 there\)"):
        make().load_state_dict({**state, "manifest": wider})


def test_another_seed_wins_over_the_state_and_what_was_learned_stays():
    trainer = make()
    trainer.prepare(*POOL)
    list(trainer.fit(*POOL, 2))
    state = trainer.state_dict()
    same, other, again = make(), make(seed=1), make(seed=1)
    for one in (same, other, again):
        one.load_state_dict(state)
    assert other.state_dict()["manifest"] == {**state["manifest"], "seed": 1}
    for one in (trainer, same, other, again):
        list(one.fit(*POOL, 4))
    weights = [one.policy.state_dict() for one in (trainer, same, other, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(torch.equal(weights[2][name], weights[3][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_contexts_survive_json():
    contexts = (StepContext(1.0, 3.0, (32, 48)), StepContext(0.1 + 0.2, 3.5, (32, 48)))
    assert unpack_contexts(json.loads(json.dumps(pack_contexts(contexts)))) == contexts
