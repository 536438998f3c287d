import pytest
import torch
from ttr_controller import budget, probe
from ttr_controller.testing import ToyBackend, ToySampler

DAMAGE = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) + 0.2
PROMPTS, SEEDS = ["a", "bb"], [0, 1]


def toy(growth):
    sampler = ToySampler(DAMAGE, growth=growth)
    return sampler, ToyBackend(sampler)


def latent_norms(sampler):
    return sampler.sample(PROMPTS, SEEDS).latent.flatten(1).norm(dim=1)


def test_one_step_score_is_step_size_times_velocity_error():
    sampler, backend = toy(growth=2.0)
    scores = probe.velocity_error_probe(sampler, PROMPTS, SEEDS, backend)
    tokens = sampler.rows * sampler.columns
    scale = (tokens / latent_norms(sampler).square()).mean().sqrt()
    torch.testing.assert_close(scores, 0.25 * DAMAGE * scale, rtol=1e-4, atol=1e-7)


def test_gains_are_the_growth_of_an_error_to_the_end():
    sampler, backend = toy(growth=2.0)
    gains = probe.step_gains(sampler, PROMPTS, SEEDS, backend)
    torch.testing.assert_close(gains, 1.5 ** torch.tensor([3.0, 2.0, 1.0, 0.0]), rtol=1e-4, atol=1e-5)


def test_flip_score_is_the_error_of_one_student_slot():
    sampler, backend = toy(growth=2.0)
    scores = probe.flip_scores(sampler, PROMPTS[:1], SEEDS[:1], backend)
    for step in range(4):
        for layer in range(3):
            mask = budget.all_full(4, 3)
            mask[step, layer] = False
            assert scores[step, layer].item() == pytest.approx(sampler.expected_error(mask, "a", 0), rel=1e-3)


def test_probe_times_gain_ranks_as_flips_do_where_errors_grow():
    sampler, backend = toy(growth=6.0)
    one_step = probe.velocity_error_probe(sampler, PROMPTS, SEEDS, backend)
    gains = probe.step_gains(sampler, PROMPTS, SEEDS, backend)
    flips = probe.flip_scores(sampler, PROMPTS, SEEDS, backend)
    best = budget.top_k_mask(flips, 6)
    assert torch.equal(budget.top_k_mask(one_step * gains[:, None], 6), best)
    assert not torch.equal(budget.top_k_mask(one_step, 6), best)


def test_an_exact_student_scores_zero():
    sampler = ToySampler(torch.zeros(4, 3))
    scores = probe.velocity_error_probe(sampler, PROMPTS, SEEDS, ToyBackend(sampler))
    assert scores.max() < 1e-6
    assert torch.equal(probe.step_gains(sampler, PROMPTS, SEEDS, ToyBackend(sampler)), torch.ones(4))


def test_ineligible_layers_are_not_measured_and_a_path_is_not_sampled_twice():
    sampler, backend = toy(growth=0.0)
    path = sampler.trajectory(PROMPTS, SEEDS)
    ticks = []
    before = sampler.calls
    eligible = torch.tensor([True, False, True])
    scores = probe.velocity_error_probe(
        sampler, PROMPTS, SEEDS, backend, eligible=eligible, path=path, on_evaluation=lambda: ticks.append(1)
    )
    assert (scores[:, 1] == 0).all()
    assert (scores[:, [0, 2]] > 0).all()
    assert len(ticks) == 8
    assert sampler.calls - before == 8 * 3
    with pytest.raises(ValueError, match="nothing to probe"):
        probe.flip_scores(sampler, PROMPTS, SEEDS, backend, eligible=torch.zeros(3, dtype=torch.bool))
