import pytest
import torch
from attn_dispatch.router import AttentionRouter, Route
from torch import multiprocessing
from ttr_controller.budget import top_k_mask
from ttr_controller.guard import ScheduleGuard
from ttr_controller.relaxed import GateHandler, RelaxedConfig, RelaxedTrainer, concrete_gates
from ttr_controller.rollout import GradientModel
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_distill.distributed import World, joined

EVEN = torch.zeros(2, 4)
POOL = (["a", "bb", "ccc"], [0, 1, 2])


def toy_with_a_best_subset():
    damage = torch.full((2, 4), 0.3)
    best = torch.tensor([[True, False, False, True], [False, True, False, True]])
    damage[best] = 1.0
    toy = ToySampler(damage, rows=2, columns=2)
    return toy, best


def test_gates_exceed_a_half_as_often_as_the_sigmoid_says():
    logits = torch.tensor([-1.5, 0.0, 0.8, 2.5])
    count = 20_000
    for temperature in (0.3, 1.0):
        gates = concrete_gates(logits.expand(count, 4), temperature, torch.Generator().manual_seed(0))
        assert gates.min() > 0.0
        assert gates.max() <= 1.0
        p = torch.sigmoid(logits)
        frequency = gates.gt(0.5).float().mean(dim=0)
        assert ((frequency - p).abs() < 3.5 * (p * (1 - p) / count).sqrt()).all()
    sharp = concrete_gates(logits.expand(count, 4), 0.05, torch.Generator().manual_seed(0))
    assert ((sharp < 0.01) | (sharp > 0.99)).float().mean() > 0.85


def test_gates_at_zero_and_one_are_the_students_and_the_teacher():
    toy, best = toy_with_a_best_subset()
    backend = ToyBackend(toy)
    path = toy.trajectory(["a"], [0])
    for step in range(2):
        handler = GateHandler(best[step].float(), toy.layers, backend)
        mixed = toy.gradient_velocity(path.latents[step], step, ["a"], handler)
        router = AttentionRouter((Route(backend, (ScheduleGuard(best[step : step + 1], toy.layers),)),))
        assert torch.allclose(mixed, toy.velocity(path.latents[step], step, ["a"], router), atol=1e-6)


def test_gradient_of_a_gate_is_that_of_finite_differences():
    damage = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).double()
    toy = ToySampler(damage, rows=2, columns=2, growth=2.0)
    assert isinstance(toy, GradientModel)
    trainer = RelaxedTrainer(toy, ToyBackend(toy), torch.zeros(3, 2))
    gates = torch.tensor([[0.2, 0.7], [0.5, 0.4], [0.9, 0.1]], requires_grad=True)
    (gradient,) = torch.autograd.grad(trainer._squared_error(gates, ["a"], [0]).sum(), gates)
    # Traces never enter queries or keys, so the student's share of the Jacobian is exactly the teacher's.
    for slot in ((0, 0), (1, 1), (2, 0)):
        moved = gates.detach().clone()
        moved[slot] += 0.02
        up = trainer._squared_error(moved, ["a"], [0])
        moved[slot] -= 0.04
        down = trainer._squared_error(moved, ["a"], [0])
        assert gradient[slot].item() == pytest.approx((up - down).item() / 0.04, rel=2e-3)


@pytest.mark.parametrize("shares", [(0.5,), (0.3, 0.5, 0.7)])
def test_the_known_best_subset_is_found_from_even_odds(shares):
    toy, best = toy_with_a_best_subset()
    trainer = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=40, shares=shares))
    rows = list(trainer.fit(*POOL))
    assert torch.equal(top_k_mask(trainer.scores, 4), best)
    assert [row["share"] for row in rows[: len(shares)]] == list(shares)
    assert len(rows) == 40


def test_ineligible_layers_stay_full_and_learn_nothing():
    toy, _ = toy_with_a_best_subset()
    toy.damage[:, 3] = 100.0
    eligible = torch.tensor([True, True, True, False])
    trainer = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=3), eligible=eligible)
    rows = list(trainer.fit(*POOL))
    assert all(row["loss"] < 2.0 for row in rows)
    assert torch.sigmoid(trainer.logits[:, :3]).mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_resumed_training_equals_an_unbroken_one_also_in_inference_mode():
    toy, _ = toy_with_a_best_subset()
    whole = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=6), seed=3)
    rows = list(whole.fit(*POOL))
    broken = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=6), seed=3)
    asked = []
    first = list(broken.fit(*POOL, should_stop=lambda: asked.append(1) or len(asked) > 3))
    assert len(first) == 3
    with torch.inference_mode():
        resumed = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=6), seed=3)
        resumed.load_state_dict(broken.state_dict())
        assert first + list(resumed.fit(*POOL)) == rows
    assert torch.equal(resumed.scores, whole.scores)
    other = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=6), seed=4)
    assert list(other.fit(*POOL)) != rows


def test_cost_is_counted_in_model_evaluations():
    toy, _ = toy_with_a_best_subset()
    trainer = RelaxedTrainer(toy, ToyBackend(toy), EVEN, RelaxedConfig(iterations=5, batch=2))
    assert trainer.evaluations() == 5 * 2 * 2 * 4


def test_wrong_settings_are_named():
    toy, _ = toy_with_a_best_subset()
    with pytest.raises(ValueError, match=r"start must be \[steps, 4\]"):
        RelaxedTrainer(toy, ToyBackend(toy), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a batch of 2"):
        next(RelaxedTrainer(toy, ToyBackend(toy), EVEN).fit(["a"], [0]))
    with pytest.raises(ValueError, match=r"saved gates are \(3, 4\)"):
        RelaxedTrainer(toy, ToyBackend(toy), EVEN).load_state_dict(
            RelaxedTrainer(toy, ToyBackend(toy), torch.zeros(3, 4)).state_dict()
        )
    for wrong in ({"shares": (1.0,)}, {"shares": ()}, {"iterations": 0}, {"learning_rate": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RelaxedConfig(**wrong)


def test_a_slot_is_worth_what_it_gains_beyond_the_common_price():
    toy, best = toy_with_a_best_subset()
    trainer = RelaxedTrainer(toy, ToyBackend(toy), EVEN)
    trainer.step(*(part[:2] for part in POOL))
    gradient = trainer._momentum
    # More full attention helps every slot; at a fixed budget some have to pay for the others.
    assert gradient.sum().abs() < 1e-5 * gradient.abs().sum()
    assert gradient[best].mean() < 0.0 < gradient[~best].mean()


class Deaf(World):
    """One of two processes that hears nothing of the other."""

    def mean_(self, tensors):
        pass

    def gather(self, value):
        return [value]


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(dict(row))


def learned(world, iterations):
    toy, _ = toy_with_a_best_subset()
    rows = Rows()
    config = RelaxedConfig(iterations=iterations, batch=1)
    trainer = RelaxedTrainer(toy, ToyBackend(toy), EVEN, config, sinks=(rows,), world=world)
    made = list(trainer.fit(*POOL, should_stop=lambda: False))
    return trainer.state_dict(), made, rows.rows


def one_process(rank, folder):
    torch.set_num_threads(1)
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    with joined("cpu", environment=environment, init_method=f"file://{folder / 'meet'}") as world:
        torch.save([learned(world, 1), learned(world, 3)], folder / f"{rank}.pt")


def test_two_processes_follow_the_mean_of_their_gradients_and_the_main_one_logs(tmp_path):
    multiprocessing.start_processes(one_process, (tmp_path,), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    alone = [learned(Deaf(rank, 2), 1) for rank in range(2)]
    mean = (alone[0][0]["gates.momentum"] + alone[1][0]["gates.momentum"]) / 2
    assert not torch.allclose(alone[0][0]["gates.momentum"], mean), "each draws gates and images of its own"
    torch.testing.assert_close(found[0][0][0]["gates.momentum"], mean)
    assert found[0][0][1][0]["loss"] == pytest.approx(sum(made[0]["loss"] for _, made, _ in alone) / 2)
    for name, value in found[0][1][0].items():
        assert torch.equal(value, found[1][1][0][name]), name
    assert [row["step"] for row in found[0][1][2]] == [1, 2, 3]
    assert found[1][1][2] == []


def test_every_iteration_is_a_row_for_the_sinks_the_first_included():
    _, made, rows = learned(None, 2)
    assert [row["step"] for row in rows] == [1, 2]
    assert [(row["loss"], row["share"]) for row in rows] == [(row["loss"], row["share"]) for row in made]
    assert all(row["target_full_attn_ratio"] == row["share"] == 0.5 for row in rows)
    assert {row["method"] for row in rows} == {"relaxed"}
