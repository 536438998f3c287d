import pytest
import torch
from torch import Tensor
from torch.nn import functional
from ttr_distill.student.blend import ConvexBlend, convex, cosine_distance


def branches(dtype: torch.dtype = torch.float32, tokens: int = 2100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kernel, landmark = (torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    # As attention answers it: tokens before heads in memory.
    return kernel, landmark.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_overwriting_equals_the_form_with_a_gradient(gamma: float | None, modulated: bool, masked: bool) -> None:
    kernel, landmark = branches()
    modulation = torch.tensor([0.1, -0.2, 0.3, 0.05]) if modulated else None
    served = torch.rand(2, 3, 2100, 1, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    blend = ConvexBlend(torch.tensor(0.4), 0.7, gamma)
    expected = convex(kernel.clone().requires_grad_(), landmark, modulation, served, blend)
    assert expected.requires_grad
    found = convex(kernel, landmark, modulation, served, blend)
    assert found.data_ptr() == kernel.data_ptr()
    torch.testing.assert_close(found, expected.detach())
    if masked and not modulated:
        assert served is not None
        kept = ~served.expand_as(found)
        torch.testing.assert_close(found[kept], branches()[0][kept])


def test_half_precision_is_not_overwritten_and_keeps_its_dtype() -> None:
    kernel, landmark = branches(torch.bfloat16, 40)
    before = kernel.clone()
    found = convex(kernel, landmark, torch.zeros(4), None, ConvexBlend(torch.tensor(0.0), 1.0, 1.0))
    assert found.dtype is torch.bfloat16
    assert torch.equal(kernel, before)


def test_tokens_whose_branches_disagree_more_get_more_of_the_landmarks() -> None:
    blend = ConvexBlend(torch.tensor(0.0), 0.2, 2.0)
    weight = blend.weight(torch.tensor([[[0.0, 0.5, 1.0, 9.0]]])).flatten()
    assert (weight.diff() > 0).all()
    assert float(weight[-1]) < 0.2
    assert float(ConvexBlend(torch.tensor(0.0), 0.2, None).weight(None)) == pytest.approx(0.1)


def test_cosine_distance_is_that_of_torch() -> None:
    kernel, landmark = branches(tokens=50)
    landmark[0, 0, 0] = 0.0
    torch.testing.assert_close(
        cosine_distance(kernel, landmark), 1.0 - functional.cosine_similarity(kernel, landmark, dim=-1)
    )
