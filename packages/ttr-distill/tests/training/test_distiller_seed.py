from collections.abc import Callable

import torch
from attn_dispatch import LayerKey
from torch import Tensor
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.distiller import Distiller

BankMaker = Callable[..., StudentBank]
DistillerMaker = Callable[..., Distiller]
Runner = Callable[..., list[Tensor]]
LAYERS = tuple(LayerKey("single", index) for index in range(3))


def test_another_seed_wins_over_the_state_and_what_was_learned_stays(
    distiller_of: DistillerMaker, bank_of: BankMaker, sampling_run: Runner
) -> None:
    first = distiller_of("near_far")
    sampling_run(first, 0, LAYERS)
    state = first.state_dict()

    def resumed(seed: int | None) -> Distiller:
        other = Distiller(bank_of("near_far"), ReadinessTracker(), first.config, seed=seed)
        other.bank.load_state_dict(first.bank.state_dict())
        other.load_state_dict(state)
        return other

    def streams(distiller: Distiller) -> dict[str, Tensor]:
        return {name: value for name, value in distiller.state_dict().tensors.items() if "rng." in name}

    for seed in (None, first.seed):
        same = resumed(seed)
        assert same.seed == first.seed
        assert all(torch.equal(value, streams(same)[name]) for name, value in streams(first).items())
    other = resumed(first.seed + 8)
    assert other.state_dict().facts["seed"] == first.seed + 8
    assert (other.updates, other.runs) == (first.updates, 1)
    old, new = state.tensors, other.state_dict().tensors
    assert set(old) == set(new)
    for name in old:
        assert torch.equal(old[name], new[name]) == ("rng." not in name), name
    again = resumed(first.seed + 8)
    for distiller in (other, again):
        sampling_run(distiller, 1, LAYERS)
    left, right = other.bank.state_dict(), again.bank.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
