import pytest
import torch
from attn_dispatch import AttentionRouter, NativeHandler, Route
from ttr_controller import budget
from ttr_controller.guard import ScheduleGuard
from ttr_controller.quality.latent import relative_rmse
from ttr_controller.testing import ToyBackend, ToySampler

DAMAGE = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) + 0.2


@pytest.mark.parametrize("growth", [0.0, 2.0])
def test_error_of_a_mask_is_the_closed_form(growth):
    toy = ToySampler(DAMAGE, growth=growth)
    teacher = toy.sample(["cat"], [3])
    for seed in range(4):
        mask = budget.random_mask(4, 3, 5, torch.Generator().manual_seed(seed))
        router = AttentionRouter((Route(ToyBackend(toy), (ScheduleGuard(mask, toy.layers),)),))
        student = toy.sample(["cat"], [3], router)
        assert relative_rmse(student.latent, teacher.latent).item() == pytest.approx(
            toy.expected_error(mask, "cat", 3), rel=1e-4
        )


def test_exact_routes_and_single_steps_repeat_the_run():
    toy = ToySampler(DAMAGE, growth=1.0)
    plain, routed = toy.sample(["a", "bb"], [0, 1]), toy.sample(["a", "bb"], [0, 1], NativeHandler())
    assert torch.equal(plain.latent, routed.latent)
    path = toy.trajectory(["a", "bb"], [0, 1])
    assert torch.equal(path.latents[-1], plain.latent)
    velocity = toy.velocity(path.latents[1], 1, ["a", "bb"])
    torch.testing.assert_close(path.latents[1] + (path.sigmas[2] - path.sigmas[1]) * velocity, path.latents[2])
    assert plain.images.shape == (2, 3, 3, 4)
    torch.testing.assert_close(toy.sample(["bb"], [1]).latent, plain.latent[1:])
