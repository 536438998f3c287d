import pytest
import torch
from ttr_distill.training.state import integer, load_optimizer, mapping, optimizer_tensors


def stepped(parameters: list[torch.nn.Parameter], steps: int, rate: float = 0.1) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        optimizer.step()
    return optimizer


def test_an_optimiser_goes_on_where_it_was() -> None:
    whole = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    stepped(whole, 3)
    half = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    tensors = optimizer_tensors(stepped(half, 2))
    assert set(tensors) == {f"{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")}
    optimizer = torch.optim.AdamW(half, lr=0.1)
    load_optimizer(optimizer, tensors)
    for parameter in half:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))
    assert optimizer_tensors(stepped([torch.nn.Parameter(torch.ones(1))], 0)) == {}


def test_foreign_moments_are_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"'1.exp_avg' belongs to no parameter; there are 1"):
        load_optimizer(optimizer, {"1.exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'0.exp_avg' is \(4,\), the parameter \(3,\)"):
        load_optimizer(optimizer, {"0.exp_avg": torch.zeros(4)})


def test_facts_are_checked() -> None:
    assert integer({"a": 3}, "a") == 3
    assert mapping({"a": {"b": 1}}, "a") == {"b": 1}
    for facts in ({}, {"a": "3"}, {"a": None}):
        with pytest.raises(ValueError, match="'a' must be a whole number"):
            integer(facts, "a")
        with pytest.raises(ValueError, match="'a' must be an object"):
            mapping(facts, "a")
