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


@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_flip_score_is_the_final_error_of_one_student_slot(every):
    """The toy's errors grow by a constant factor per step, so growth between followed steps is exact too."""
    sampler, backend = toy(growth=2.0)
    scores = probe.flip_scores(sampler, PROMPTS[:1], SEEDS[:1], backend, every=every)
    for step in range(4):
        for layer in range(3):
            mask = budget.all_full(4, 3)
            mask[step, layer] = False
            assert scores[step, layer].item() == pytest.approx(sampler.expected_error(mask, "a", 0), rel=1e-3)


def test_flip_scores_of_several_prompts_are_joined_by_their_root_mean_square():
    sampler, backend = toy(growth=2.0)
    both = probe.flip_scores(sampler, PROMPTS, SEEDS, backend)
    each = [probe.flip_scores(sampler, [prompt], [seed], backend) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    torch.testing.assert_close(both, torch.stack(each).square().mean(dim=0).sqrt(), rtol=1e-4, atol=1e-7)


def test_where_errors_grow_flips_find_the_best_mask_and_the_one_step_probe_does_not():
    sampler, backend = toy(growth=6.0)
    flips = budget.top_k_mask(probe.flip_scores(sampler, PROMPTS, SEEDS, backend), 6)
    one_step = budget.top_k_mask(probe.velocity_error_probe(sampler, PROMPTS, SEEDS, backend), 6)
    grown = DAMAGE * 2.5 ** torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    assert torch.equal(flips, budget.top_k_mask(grown, 6))
    assert sampler.expected_error(one_step, "a", 0) > 1.2 * sampler.expected_error(flips, "a", 0)


def test_an_exact_student_scores_zero():
    sampler = ToySampler(torch.zeros(4, 3))
    for scores in (probe.velocity_error_probe, probe.flip_scores):
        assert scores(sampler, PROMPTS, SEEDS, ToyBackend(sampler)).max() < 1e-6


@pytest.mark.parametrize(("layers", "every"), [([True, True, True], 1), ([True, False, True], 2)])
def test_evaluations_of_the_flips_are_counted(layers, every):
    sampler, backend = toy(growth=1.0)
    path = sampler.trajectory(PROMPTS, SEEDS)
    ticks = []
    eligible = torch.tensor(layers)
    scores = probe.flip_scores(
        sampler,
        PROMPTS,
        SEEDS,
        backend,
        every=every,
        eligible=eligible,
        path=path,
        on_evaluation=lambda: ticks.append(1),
    )
    assert len(ticks) == probe.flip_evaluations(4, sum(layers), every)
    assert ((scores > 0) == eligible).all()
    with pytest.raises(ValueError, match="every must be"):
        probe.flip_evaluations(4, 3, every=0)


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
