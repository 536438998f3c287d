import numpy as np
import pytest
import torch
from ttr_controller.quality.latent import cosine_error, relative_rmse


def test_relative_rmse_per_item():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 63, 16, generator=generator) * torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    student = teacher + torch.randn(3, 63, 16, generator=generator)
    t, s = teacher.numpy(), student.numpy()
    expected = [np.sqrt(np.mean((s[i] - t[i]) ** 2)) / np.sqrt(np.mean(t[i] ** 2)) for i in range(3)]
    np.testing.assert_allclose(relative_rmse(student, teacher).numpy(), expected, rtol=1e-5)
    assert (relative_rmse(teacher, teacher) == 0).all()


def test_cosine_error_ignores_scale():
    teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    student = torch.tensor([[0.0, 5.0], [6.0, 8.0]])
    torch.testing.assert_close(cosine_error(student, teacher), torch.tensor([1.0, 0.0]))


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        relative_rmse(torch.zeros(2, 3), torch.zeros(2, 4))
