import pytest
import torch
from attn_dispatch.backends.qk_norm import QkNorm


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 3, 17, 8, generator=torch.Generator().manual_seed(0))
    return (x * torch.linspace(0.1, 20, 17)[:, None]).to(dtype)


def by_hand(x: torch.Tensor, norm: QkNorm) -> torch.Tensor:
    """One token at a time, in float64."""
    out = torch.empty_like(x, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).tolist():
        token = x[tuple(place)].double()
        length = float((token * token).sum()) ** 0.5 + norm.eps
        if norm.normalize:
            out[tuple(place)] = token / length
            continue
        if norm.power > 0:
            token = token / length**norm.power
        if norm.clip > 0:
            token = token * min(1.0, norm.clip / length)
        out[tuple(place)] = token
    return out


@pytest.mark.parametrize(
    "norm",
    [
        QkNorm(normalize=True),
        QkNorm(normalize=True, power=0.5, clip=3.0),
        QkNorm(power=0.4),
        QkNorm(clip=6.0),
        QkNorm(power=0.4, clip=6.0, eps=0.1),
        QkNorm(power=1.0),
    ],
)
def test_norms_are_changed_as_said(norm: QkNorm) -> None:
    x = tokens()
    torch.testing.assert_close(norm.apply(x).double(), by_hand(x, norm), rtol=1e-5, atol=1e-6)


def test_clip_uses_the_norm_that_the_token_came_with() -> None:
    x = torch.tensor([[[[30.0, 40.0]]]])  # norm 50
    changed = QkNorm(power=1.0, clip=10.0, eps=0.0).apply(x)
    torch.testing.assert_close(changed.norm(), torch.tensor(10 / 50), rtol=1e-6, atol=0)


def test_nothing_to_do_returns_the_tensor_itself() -> None:
    x = tokens()
    assert QkNorm(sigma_max=3.0).apply(x) is x


def test_half_precision_is_computed_in_float32() -> None:
    x = tokens(torch.float16) * 500
    changed = QkNorm(normalize=True).apply(x)
    assert changed.dtype is torch.float16
    assert changed.isfinite().all()
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("norm", "sigma", "active"),
    [
        (QkNorm(), 0.5, False),
        (QkNorm(sigma_max=1.0), 0.5, False),
        (QkNorm(power=0.2), None, True),
        (QkNorm(clip=0.2), 9.0, True),
        (QkNorm(normalize=True, sigma_max=0.7), 0.7, True),
        (QkNorm(normalize=True, sigma_max=0.7), 0.71, False),
        (QkNorm(normalize=True, sigma_max=0.7), None, False),
    ],
)
def test_the_noise_level_decides_where_it_is_limited(norm: QkNorm, sigma: float | None, active: bool) -> None:
    assert norm.active(sigma) is active
