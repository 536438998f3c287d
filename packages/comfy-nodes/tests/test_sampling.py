"""ComfyUI's sampler as the controller's training sees it; with nodes in ``nodes/test_controller.py``."""

from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, StepContext
from attn_dispatch.testing import RecordingHandler


def _step(sigma: float) -> StepContext:
    return StepContext(sigma, 1.0, (4, 4), (0,))


def test_the_first_step_stands_for_all(host: Any) -> None:
    from comfy_nodes.sampling import FirstStep

    inner = RecordingHandler()
    handler = FirstStep(inner)
    q = torch.randn(1, 1, 3, 4)
    for _ in range(2):
        handler.begin_run()
        for sigma in (0.9, 0.5):
            assert torch.equal(handler(AttentionCall(q, q, q, step=_step(sigma)), lambda call: call.v), q)
        handler.end_run()
    assert {call.step for call in inner.calls} == {_step(0.9)}
    assert (inner.begun, inner.ended) == (2, 2)


def test_no_steps_is_said(host: Any) -> None:
    from comfy_nodes.sampling import SamplerSettings

    with pytest.raises(ValueError, match=r"the sampler has no steps: 4 steps at denoise 0.2; raise steps or denoise"):
        SamplerSettings(4, denoise=0.2)


def test_entries_keep_mask_and_place(host: Any) -> None:
    from comfy_nodes.sampling import _entry

    latent = {"samples": torch.arange(12.0).view(3, 1, 2, 2), "batch_index": [5, 6, 7]}
    masked = {**latent, "noise_mask": torch.arange(3.0).view(3, 1, 1, 1)}
    entry = _entry(masked, 1)
    assert entry["samples"].tolist() == latent["samples"][1:2].tolist()
    assert entry["noise_mask"].item() == 1.0
    assert entry["batch_index"] == [6]
    shared = _entry({**latent, "noise_mask": torch.ones(1, 1, 2, 2)}, 2)
    assert shared["noise_mask"].shape == (1, 1, 2, 2)


def test_small_pictures(host: Any) -> None:
    from comfy_nodes.sampling import small_pictures

    pictures = small_pictures(torch.randn(2, 16, 3, 100, 50))
    assert pictures.shape == (2, 3, 64, 32)
    assert 0.0 <= float(pictures.min()) <= float(pictures.max()) <= 1.0


def test_a_latent_without_samples_is_refused(host: Any) -> None:
    from comfy_nodes.sampling import ComfySampler, SamplerSettings

    with pytest.raises(ValueError, match=r"the latent holds no samples"):
        ComfySampler(
            None, [], [], {"samples": torch.zeros(4, 4)}, layers=(), settings=SamplerSettings(), key="k", decode=abs
        )
