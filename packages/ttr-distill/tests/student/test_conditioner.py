import math

import pytest
import torch
from attn_dispatch import StepContext
from ttr_distill.student.conditioner import SigmaCfgConditioner


def random_conditioner() -> SigmaCfgConditioner:
    conditioner = SigmaCfgConditioner(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioner.mlp[2].weight.normal_(generator=torch.Generator().manual_seed(1))
        conditioner.mlp[2].bias.normal_(generator=torch.Generator().manual_seed(2))
    return conditioner


def test_it_starts_as_the_identity() -> None:
    assert all(float(value.detach()) == 0.0 for value in SigmaCfgConditioner()(StepContext(0.7, 3.5)))


def test_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in SigmaCfgConditioner().state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (128, 64),
        "mlp.0.bias": (128,),
        "mlp.2.weight": (4, 128),
        "mlp.2.bias": (4,),
    }


@pytest.mark.parametrize("cfg", [1.0, 3.5, math.nan, math.inf])
def test_the_scalars_equal_the_formula(cfg: float) -> None:
    conditioner = random_conditioner()
    state = {name: value.double() for name, value in conditioner.state_dict().items()}
    embedding = []
    for x in (0.37, cfg if math.isfinite(cfg) else 1.0):
        angles = [x * math.exp(-math.log(10000) * i / 15) for i in range(16)]
        embedding += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    hidden = state["mlp.0.weight"] @ torch.tensor(embedding, dtype=torch.float64) + state["mlp.0.bias"]
    expected = state["mlp.2.weight"] @ (hidden * hidden.sigmoid()) + state["mlp.2.bias"]
    actual = torch.stack(conditioner(StepContext(0.37, cfg))).double()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sigma_and_guidance_both_matter() -> None:
    conditioner = random_conditioner()
    base, sigma, cfg = (torch.stack(conditioner(StepContext(*at))) for at in ((0.3, 1.0), (0.8, 1.0), (0.3, 4.0)))
    assert not torch.allclose(base, sigma)
    assert not torch.allclose(base, cfg)
