import pytest
import torch
from ttr_controller import budget
from ttr_controller.judge import Judge
from ttr_controller.quality.objective import QualityObjective
from ttr_controller.testing import ToyBackend, ToySampler


class ByPrompt(QualityObjective):
    def __init__(self):
        super().__init__()
        self.asked = []

    def __call__(self, student_latent, teacher_latent, student_images, teacher_images, prompts=None):
        self.asked.append(prompts)
        return super().__call__(student_latent, teacher_latent, student_images, teacher_images, prompts)


def test_the_objective_gets_the_prompts():
    toy = ToySampler(torch.ones(4, 3))
    objective = ByPrompt()
    Judge(toy, ToyBackend(toy), objective).mask_errors(budget.all_full(4, 3), ["a", "bb"], [0, 1])
    assert objective.asked == [["a", "bb"]]


def test_mask_errors_are_those_of_the_mask_per_image():
    toy = ToySampler(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    judge = Judge(toy, ToyBackend(toy))
    mask = budget.first_steps_full(4, 3, 5)
    errors = judge.mask_errors(mask, ["a", "bb"], [0, 1])
    expected = [toy.expected_error(mask, "a", 0), toy.expected_error(mask, "bb", 1)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-4)
    assert judge.mask_errors(budget.all_full(4, 3), ["a"], [0]).tolist() == [0.0]
