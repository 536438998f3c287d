import pytest
import torch
from attn_dispatch.call import StepContext
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.saved_policy import load_policy, load_trainer, save_trainer
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_controller.trainer import ControllerConfig, ControllerTrainer
from ttr_distill.checkpoint import CheckpointError, save_checkpoint

POOL = (["a", "bb", "c"], [0, 1, 2])
STEP = StepContext(0.5, 3.0, (2, 2))


def make(seed=0, hidden_dim=32, **settings):
    toy = ToySampler(torch.rand(3, 3, generator=torch.Generator().manual_seed(0)), rows=2, columns=2)
    policy = RoutingPolicy(3, PolicyConfig(embed_dim=16, hidden_dim=hidden_dim), seed=0)
    config = ControllerConfig(validate_every=1, checkpoint_every=2, **settings)
    eligible = torch.tensor([True, True, False])
    trainer = ControllerTrainer(toy, ToyBackend(toy), policy, config, seed=seed, eligible=eligible)
    trainer.prepare(*POOL)
    return trainer


@pytest.mark.parametrize("baseline", ["leave_one_out", "ema"])
def test_a_training_goes_on_from_its_checkpoint(tmp_path, baseline):
    whole, broken, resumed = (make(baseline=baseline) for _ in range(3))
    rows = list(whole.fit(*POOL, 5))
    saves = []

    def checkpoint():
        saves.append(broken.updates)
        save_trainer(tmp_path / "c", broken, fingerprint="f")

    first = list(broken.fit(*POOL, 3, checkpoint=checkpoint))
    assert saves == [2, 3]
    load_trainer(tmp_path / "c", resumed, fingerprint="f")
    assert first + list(resumed.fit(*POOL, 5)) == rows
    assert resumed.rollouts == 20


def test_a_stopped_training_is_saved_at_its_end():
    trainer, saves, asked = make(), [], []
    rows = trainer.fit(
        *POOL, 9, should_stop=lambda: asked.append(1) or len(asked) > 5, checkpoint=lambda: saves.append(1)
    )
    assert len(list(rows)) == 1
    assert saves == [1]


def test_the_best_policy_is_served_in_eval_mode(tmp_path):
    trainer = make()
    list(trainer.fit(*POOL, 3))
    save_trainer(tmp_path / "c", trainer, fingerprint="f")
    saved = load_policy(tmp_path / "c", fingerprint="f")
    assert torch.equal(saved.policy(STEP), trainer.best_policy()(STEP))
    assert saved.layers == trainer.sampler.layers
    assert saved.eligible.tolist() == [True, True, False]
    assert (saved.updates, saved.error) == (3, trainer.best.error)
    assert not saved.policy.training


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path):
    save_trainer(tmp_path / "c", make(), fingerprint="f")
    with pytest.raises(CheckpointError, match="f"):
        load_policy(tmp_path / "c", fingerprint="other")
    with pytest.raises(
        CheckpointError, match=r"does not fit: the saved weights cannot follow .*hidden_dim: 64 here, 32 there"
    ):
        load_trainer(tmp_path / "c", make(hidden_dim=64), fingerprint="f")
    other = make(seed=1)
    load_trainer(tmp_path / "c", other, fingerprint="f")
    assert other.seed == 1, "what the caller sets wins"
    save_checkpoint(tmp_path / "d", {"a": torch.zeros(1)}, {"kind": "students"})
    with pytest.raises(CheckpointError, match="holds no controller"):
        load_policy(tmp_path / "d")
