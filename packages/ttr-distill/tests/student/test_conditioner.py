import math

import pytest
import torch
from attn_dispatch import StepContext
from ttr_distill.student.conditioner import SigmaCfgConditioner


def random_conditioner(sigma_scale: float = 1000.0, cfg_scale: float = 10.0) -> SigmaCfgConditioner:
    conditioner = SigmaCfgConditioner(
        4, sigma_scale=sigma_scale, cfg_scale=cfg_scale, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        conditioner.mlp[2].weight.normal_(generator=torch.Generator().manual_seed(1))
        conditioner.mlp[2].bias.normal_(generator=torch.Generator().manual_seed(2))
    return conditioner


def test_it_starts_as_the_identity() -> None:
    assert SigmaCfgConditioner(6)(StepContext(0.7, 3.5)).tolist() == [0.0] * 6


def test_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in SigmaCfgConditioner(4).state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (128, 64),
        "mlp.0.bias": (128,),
        "mlp.2.weight": (4, 128),
        "mlp.2.bias": (4,),
    }


@pytest.mark.parametrize("scales", [(1.0, 1.0), (100.0, 10.0)])
@pytest.mark.parametrize("cfg", [1.0, 3.5, math.nan, math.inf])
def test_the_scalars_equal_the_formula(cfg: float, scales: tuple[float, float]) -> None:
    conditioner = random_conditioner(*scales)
    state = {name: value.double() for name, value in conditioner.state_dict().items()}
    embedding = []
    for x in (0.37 * scales[0], (cfg if math.isfinite(cfg) else 1.0) * scales[1]):
        angles = [x * math.exp(-math.log(10000) * i / 15) for i in range(16)]
        embedding += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    hidden = state["mlp.0.weight"] @ torch.tensor(embedding, dtype=torch.float64) + state["mlp.0.bias"]
    expected = state["mlp.2.weight"] @ (hidden * hidden.sigmoid()) + state["mlp.2.bias"]
    actual = conditioner(StepContext(0.37, cfg)).double()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sigma_and_guidance_both_matter() -> None:
    conditioner = random_conditioner()
    base, sigma, cfg = (conditioner(StepContext(*at)) for at in ((0.3, 1.0), (0.8, 1.0), (0.3, 4.0)))
    assert not torch.allclose(base, sigma)
    assert not torch.allclose(base, cfg)


def test_sigma_between_zero_and_one_moves_what_the_network_sees() -> None:
    sigma = torch.linspace(0, 1, 51)
    moving = {}
    for scale in (1.0, 1000.0):
        embedding = SigmaCfgConditioner(4, sigma_scale=scale).sigma_embed(sigma)
        moving[scale] = int((embedding.std(0) > 0.05).sum())
    assert moving[1.0] <= 10
    assert moving[1000.0] >= 26
    # And neighbouring steps of a long schedule are told apart.
    near = SigmaCfgConditioner(4).sigma_embed(torch.tensor([0.50, 0.51]))
    coarse = SigmaCfgConditioner(4, sigma_scale=1.0).sigma_embed(torch.tensor([0.50, 0.51]))
    assert float((near[0] - near[1]).norm()) > 1.0 > 0.05 > float((coarse[0] - coarse[1]).norm())
