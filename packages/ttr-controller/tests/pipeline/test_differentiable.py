"""Gradients through the embedded teacher's sampler."""

import pytest
import torch
from attn_dispatch.router import AttentionRouter, NativeHandler, Route
from ttr_controller.guard import ScheduleGuard
from ttr_controller.pipeline.differentiable import DifferentiableTinySampler
from ttr_controller.relaxed import GateHandler, RelaxedConfig, RelaxedTrainer
from ttr_controller.rollout import GradientModel
from ttr_distill.student import StudentBackend, StudentBank, preset
from ttr_distill.tiny import load_teacher

PROMPTS = ["fox on green", "red apple"]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


def students(sampler):
    bank = StudentBank.for_layers(preset("near_far", tile=2, top_k=0), sampler.layers, sampler.heads, sampler.width)
    return StudentBackend(bank)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_differentiable_step_is_the_sampled_one(teacher, guidance):
    sampler = DifferentiableTinySampler(teacher, rows=8, columns=8, steps=2, guidance=guidance)
    assert isinstance(sampler, GradientModel)
    backend = students(sampler)
    latent = sampler.noise(PROMPTS, [0, 1])
    exact = sampler.gradient_velocity(latent, 1, PROMPTS, NativeHandler())
    torch.testing.assert_close(exact, sampler.velocity(latent, 1, PROMPTS), atol=1e-5, rtol=1e-4)
    mask = torch.tensor([[True, False, True, False, False, True]])
    router = AttentionRouter((Route(backend, (ScheduleGuard(mask, sampler.layers),)),))
    mixed = sampler.gradient_velocity(latent, 1, PROMPTS, GateHandler(mask[0].float(), sampler.layers, backend))
    torch.testing.assert_close(mixed, sampler.velocity(latent, 1, PROMPTS, router), atol=1e-4, rtol=1e-3)
    assert (mixed - exact).abs().max() > 1e-3


def test_gate_gradients_are_close_to_finite_differences(teacher):
    sampler = DifferentiableTinySampler(teacher, rows=8, columns=8, steps=2, guidance=1.0)
    trainer = RelaxedTrainer(sampler, students(sampler), torch.zeros(2, 6), RelaxedConfig(batch=1))
    gates = torch.full((2, 6), 0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad(trainer._squared_error(gates, PROMPTS[:1], [0]).sum(), gates)
    measured = torch.zeros(2, 6)
    for step in range(2):
        for layer in range(6):
            moved = gates.detach().clone()
            moved[step, layer] += 0.05
            up = trainer._squared_error(moved, PROMPTS[:1], [0]).item()
            moved[step, layer] -= 0.1
            measured[step, layer] = (up - trainer._squared_error(moved, PROMPTS[:1], [0]).item()) / 0.1
    # The student's share of the Jacobian is taken to be the teacher's: right in direction, not to the digit.
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), measured.flatten(), dim=0)
    assert cosine > 0.95
    assert torch.equal(
        gradient.flatten().topk(3).indices.sort().values, measured.flatten().topk(3).indices.sort().values
    )


def test_learning_leaves_the_teacher_as_it_was(teacher):
    sampler = DifferentiableTinySampler(teacher, rows=8, columns=8, steps=2, guidance=1.0)
    before = sampler.sample(PROMPTS, [0, 1]).latent
    with torch.inference_mode():
        trainer = RelaxedTrainer(sampler, students(sampler), torch.rand(2, 6), RelaxedConfig(iterations=2, batch=1))
        rows = list(trainer.fit(PROMPTS, [0, 1]))
    assert all(0.0 < row["loss"] < 1.0 for row in rows)
    assert torch.equal(before, sampler.sample(PROMPTS, [0, 1]).latent)
    assert all(parameter.grad is None for parameter in teacher.transformer.parameters())
