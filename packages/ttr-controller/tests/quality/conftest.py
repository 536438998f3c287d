import pytest
import torch


@pytest.fixture
def pictures():
    """Smooth pictures in [0, 1], ``[B, 3, H, W]``; noise of a given size on top."""

    def make(seed=0, noise=0.0, shape=(2, 3, 72, 80)):
        generator = torch.Generator().manual_seed(seed)
        smooth = torch.rand(*shape[:2], 5, 6, generator=generator)
        picture = torch.nn.functional.interpolate(smooth, shape[2:], mode="bilinear")
        grain = torch.randn(shape, generator=torch.Generator().manual_seed(99))
        return (picture + noise * grain).clamp(0, 1)

    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub folder: whatever a library wants to load is not there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hub"
