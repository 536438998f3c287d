"""The model of how slots add up, against closed forms, exhaustive search and what was sampled."""

from itertools import combinations

import pytest
import torch
from ttr_controller import budget
from ttr_controller.pairs import PairErrors, measure_pairs, pair_evaluations
from ttr_controller.probe import flip_scores
from ttr_controller.testing import ToyBackend, ToySampler

IMAGES = (["a", "bb"], [0, 1])
DAMAGE = torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) ** 2 + 0.05


def toy():
    sampler = ToySampler(DAMAGE, rows=2, columns=2, growth=3.0)
    return sampler, ToyBackend(sampler)


def pushing(seed, slots=8, images=3, values=2):
    """A model whose slots push the latent in few directions, so that they add up or undo one another."""
    vectors = torch.randn(images, slots + 1, values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[:, 0] = -vectors[:, 1:].sum(dim=1)  # all of them full: no error
    centre = torch.zeros(2, slots // 2, dtype=torch.bool)
    return PairErrors(centre, torch.arange(slots), vectors @ vectors.transpose(1, 2))


def exhaustive(errors, count):
    slots = errors.slots.shape[0]
    best = torch.inf
    for chosen in combinations(range(slots), count):
        mask = torch.zeros(slots, dtype=torch.bool)
        mask[list(chosen)] = True
        best = min(best, float(errors.predict(mask.view(errors.centre.shape)).mean()))
    return best


@pytest.mark.parametrize("centre", [0, 5, 12])
def test_any_mask_of_a_linear_model_is_predicted_exactly(centre):
    sampler, backend = toy()
    errors = measure_pairs(sampler, *IMAGES, backend, budget.first_steps_full(3, 4, centre))
    for seed in range(5):
        mask = budget.random_mask(3, 4, 2 * seed + 1, torch.Generator().manual_seed(seed))
        expected = [sampler.expected_error(mask, prompt, seed) for prompt, seed in zip(*IMAGES, strict=True)]
        assert errors.predict(mask).tolist() == pytest.approx(expected, rel=1e-4)


def test_changes_around_exact_sampling_are_the_flips():
    sampler, backend = toy()
    errors = measure_pairs(sampler, *IMAGES, backend, budget.all_full(3, 4))
    torch.testing.assert_close(errors.alone(), flip_scores(sampler, *IMAGES, backend, every=1), rtol=1e-4, atol=1e-7)


def test_evaluations_are_what_was_asked_of_the_model():
    sampler, backend = toy()
    told = []
    eligible = torch.tensor([True, False, True, True])
    path = sampler.trajectory(*IMAGES)
    before = sampler.calls
    errors = measure_pairs(
        sampler,
        *IMAGES,
        backend,
        budget.all_student(3, 4),
        eligible=eligible,
        path=path,
        on_evaluation=lambda: told.append(1),
    )
    assert len(told) == (sampler.calls - before) / 4 == pair_evaluations(3, 3)
    assert errors.centre[:, 1].all()
    assert not errors.centre[:, 0].any()
    for count in (0, 4, 9):
        mask = errors.best_mask(count)
        assert mask[:, 1].all()
        assert int(mask.sum()) == count + 3
    scores = errors.scores([4])
    assert (scores[:, 1] == 0).all()
    assert (scores[:, eligible] > 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_exchanges_find_what_ranking_slots_one_by_one_does_not(seed):
    errors = pushing(seed)
    alone = errors.alone()
    found = float(errors.predict(errors.best_mask(4)).mean())
    assert found <= 1.15 * exhaustive(errors, 4)
    assert found < float(errors.predict(budget.top_k_mask(alone, 4)).mean())


def test_ranked_masks_lie_within_one_another_and_the_first_is_met_best():
    errors = pushing(1)
    scores = errors.scores([4, 2, 6])
    two, four, six = (budget.top_k_mask(scores, count) for count in (2, 4, 6))
    assert torch.equal(four, errors.best_mask(4))
    assert torch.equal(two, errors.best_mask(2, within=four))
    assert torch.equal(six, errors.best_mask(6, keep=four))
    assert not (two & ~four).any()
    assert not (four & ~six).any()


def test_what_does_not_fit_is_refused():
    errors = pushing(0)
    with pytest.raises(ValueError, match="between 0 and 8, got 9"):
        errors.best_mask(9)
    sampler, backend = toy()
    for centre, eligible in ((torch.zeros(2, 4), None), (torch.zeros(3, 4), torch.zeros(4, dtype=torch.bool))):
        with pytest.raises(ValueError, match="centre must be"):
            measure_pairs(sampler, *IMAGES, backend, centre.bool(), eligible=eligible)
