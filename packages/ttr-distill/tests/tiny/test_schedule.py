from __future__ import annotations

import numpy as np
import pytest
import torch
from ttr_distill.tiny import initial_noise, sigma_schedule


@pytest.mark.parametrize(("steps", "tokens"), [(12, 256), (8, 1024), (4, 4096), (3, 64), (1, 500)])
def test_agrees_with_the_flux_scheduler(steps: int, tokens: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    torch.testing.assert_close(sigma_schedule(steps, tokens), scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_more_tokens_stay_noisy_for_longer() -> None:
    small, large = sigma_schedule(8, 256), sigma_schedule(8, 4096)
    assert small[0] == large[0] == 1
    assert small[-1] == large[-1] == 0
    assert (large[1:-1] > small[1:-1]).all()
    assert (small.diff() < 0).all()


def test_noise_of_a_seed_is_the_same_in_any_batch() -> None:
    batch = initial_noise([3, 5, 3], 4, 6)
    assert batch.shape == (3, 24, 16)
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch[1], initial_noise([5], 4, 6)[0])
    assert not torch.equal(batch[0], batch[1])


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initial_noise([1], 2, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        sigma_schedule(0, 256)
