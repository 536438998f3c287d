import pytest
import torch
from ttr_controller.layer_errors import LayerErrorMeter, measure_layer_errors
from ttr_controller.testing import ToyBackend, ToySampler


def test_errors_are_those_of_the_students_in_each_slot():
    damage = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    toy, double = ToySampler(damage), ToySampler(2 * damage)
    meter = measure_layer_errors(toy, ["a", "bb"], [0, 1], ToyBackend(toy))
    errors = meter.errors()
    assert meter.sigmas == tuple(context.sigma for context in toy.contexts())
    # The error of a slot is its damage over the size of the exact answer, which does not depend on the damage.
    twice = measure_layer_errors(double, ["a", "bb"], [0, 1], ToyBackend(double)).errors()
    assert torch.allclose(twice, 2 * errors)
    assert torch.allclose(errors[0] / errors[0, 0], damage[0] / damage[0, 0], rtol=0.3)


def test_the_samples_are_the_teachers():
    toy = ToySampler(torch.ones(2, 2))
    made = toy.sample(["a"], [0], LayerErrorMeter(ToyBackend(toy), toy.layers)).latent
    assert torch.equal(made, toy.sample(["a"], [0]).latent)


def test_nothing_measured_is_an_error():
    toy = ToySampler(torch.ones(2, 2))
    with pytest.raises(ValueError, match="no attention call"):
        LayerErrorMeter(ToyBackend(toy), toy.layers).errors()
