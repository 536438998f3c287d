import pytest
import torch
from attn_kernels import MlpFeatureMap
from torch import Tensor
from torch.nn import functional
from ttr_distill.student.feature_map_gradient import mlp_features, native_products

WIDTH, HIDDEN, FEATURES = 6, 10, 8


def drawn(dtype: torch.dtype, hidden: int = HIDDEN, features: int = FEATURES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(hidden, WIDTH), (hidden,), (hidden, hidden), (hidden,), (features, hidden), (features,)]
    return [(0.6 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))


def by_autograd(x: Tensor, weights: list[Tensor], normalise: bool) -> Tensor:
    w1, b1, w2, b2, w3, b3 = weights
    hidden = functional.silu(functional.silu(x @ w1.T + b1) @ w2.T + b2)
    features = functional.elu(hidden @ w3.T + b3) + 1
    return features / (features.norm(dim=-1, keepdim=True) + 1e-3) if normalise else features


@pytest.mark.parametrize("normalise", [True, False])
def test_values_and_gradients_equal_autograd_and_finite_differences(normalise: bool) -> None:
    weights, x = drawn(torch.float64), inputs(2, 3, 7).requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return mlp_features(x, weights, normalise=normalise, norm_eps=1e-3, products=None)

    expected = by_autograd(x, weights, normalise)
    torch.testing.assert_close(run(x, *weights), expected)
    along = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((expected * along).sum(), [x, *weights])
    found = torch.autograd.grad((run(x, *weights) * along).sum(), [x, *weights])
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(run, (x, *weights))


def test_it_is_the_map_that_serves() -> None:
    weights, x = drawn(torch.float32), inputs(1, 2, 5, dtype=torch.float32)
    served = MlpFeatureMap(*weights, normalise=True, norm_eps=1e-3)
    from attn_kernels.kernel_regression.feature_map import map_features

    trained = mlp_features(x, served.weights, normalise=True, norm_eps=1e-3, products=None)
    torch.testing.assert_close(trained, map_features(served, x))


def test_half_precision_products_give_nearly_the_same_gradient_in_float32() -> None:
    weights, x = drawn(torch.float32, 64, 32), inputs(400, dtype=torch.float32)
    along = torch.randn(400, 32, generator=torch.Generator().manual_seed(2))
    gradients = []
    for products in (None, torch.bfloat16):
        features = mlp_features(x, weights, normalise=True, norm_eps=1e-6, products=products)
        assert features.dtype is torch.float32
        found = torch.autograd.grad((features * along).sum(), weights)
        assert {part.dtype for part in found} == {torch.float32}
        gradients.append(torch.cat([part.flatten() for part in found]))
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert 1e-4 < error < 0.03


def test_what_is_kept_for_the_backward_pass_is_in_the_dtype_of_the_products() -> None:
    weights, x = drawn(torch.float32, 256, 32), inputs(1000, dtype=torch.float32)
    kept = []
    for products in (torch.float32, torch.bfloat16):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlp_features(x, weights, normalise=True, norm_eps=1e-6, products=products)
        kept.append(sum(sizes))
    assert kept[1] < 0.65 * kept[0]


def test_which_devices_multiply_bfloat16() -> None:
    assert native_products(torch.device("meta")) is None
    assert native_products(torch.device("cpu")) in (None, torch.bfloat16)
