import pytest
import torch
from ttr_distill.grad import plain, training_mode


def test_training_works_inside_inference_mode_and_leaves_it_as_it_was() -> None:
    with torch.inference_mode():
        captured = torch.randn(3, 4)
        with training_mode():
            weight = torch.nn.Parameter(torch.ones(4))
            (plain(captured) * weight).square().sum().backward()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(weight.grad, 2 * captured.square().sum(0))


def test_training_mode_ends_also_after_an_error() -> None:
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="stop"), training_mode():
            raise RuntimeError("stop")
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_plain_is_always_an_ordinary_contiguous_copy(dtype: torch.dtype | None) -> None:
    with torch.inference_mode():
        source = torch.randn(2, 6, 4).transpose(1, 2)
        with training_mode():
            copy = plain(source, dtype=dtype)
    assert not copy.is_inference()
    assert copy.is_contiguous()
    assert copy.data_ptr() != source.data_ptr()
    assert copy.dtype == (dtype or source.dtype)
    torch.testing.assert_close(copy, source.to(copy.dtype))


def test_plain_cuts_the_history() -> None:
    source = torch.ones(3, requires_grad=True) * 2
    assert not plain(source).requires_grad
