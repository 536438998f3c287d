"""What a model call tells: step, sizes and layout, per call and thread, with one wait per evaluation."""

import threading
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionRouter
from attn_dispatch.adapters.comfyui import install
from attn_dispatch.adapters.comfyui_fake import copy_options
from attn_dispatch.testing import RecordingHandler
from torch import Tensor

from .conftest import FakeHost, layers

SLOT = "optimized_attention_override"


def test_separate_calls_of_the_prompts_are_told_apart() -> None:
    host = FakeHost()
    handler = RecordingHandler()
    model = host.model()
    patched = host.install(model, handler)
    out = host.sample(patched, cfg=2.0, together=False)
    torch.testing.assert_close(out, host.sample(model, cfg=2.0))
    found = [call.step.cond_or_uncond for call in handler.calls if call.step]
    assert found == ([(0,)] * len(layers()) + [(1,)] * len(layers())) * 3
    assert len({call.step.sigma for call in handler.calls if call.step}) == 3


def test_threads_of_one_model_do_not_mix() -> None:
    """As a host with several GPUs evaluates the prompts: one patched model, two threads, different sizes."""
    host = FakeHost()
    handler = RecordingHandler()
    patched = host.install(host.model(), handler)
    barrier = threading.Barrier(2)
    network = patched.network
    sizes = ((8, 8), (6, 10))

    def work(index: int) -> None:
        options = copy_options(patched.model_options["transformer_options"])
        level = torch.tensor([0.9 - 0.5 * index])
        options.update(wrappers=copy_options(patched.wrappers), sigmas=level, cond_or_uncond=[index])
        for _ in range(8):
            barrier.wait(timeout=20)
            with torch.no_grad():
                network(
                    torch.zeros(1, 4, *sizes[index]), level, torch.zeros(1, 5, 8), transformer_options=dict(options)
                )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handler.calls) == 2 * 8 * len(layers())
    for call in handler.calls:
        assert call.step is not None
        (index,) = call.step.cond_or_uncond
        assert call.step.sigma == pytest.approx(0.9 - 0.5 * index)
        assert call.step.latent_size == sizes[index]
        assert call.layout is not None
        assert call.layout.length == 5 + sizes[index][0] * sizes[index][1] // 4


def test_the_noise_level_is_read_once_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost()
    reads: list[int] = []
    plain = Tensor.tolist

    def counted(self: Tensor) -> Any:
        reads.append(1)
        return plain(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    host.sample(host.install(host.model(), AttentionRouter()), cfg=2.0, together=False)
    assert len(reads) == 3


def test_a_batch_of_several_noise_levels_has_no_step() -> None:
    host = FakeHost()
    handler = RecordingHandler()
    patched = host.install(host.model(), handler)
    options = copy_options(patched.model_options["transformer_options"])
    options.update(wrappers=copy_options(patched.wrappers), sigmas=torch.tensor([0.5, 0.2]), cond_or_uncond=[0])
    with torch.no_grad():
        patched.network(torch.zeros(2, 4, 4, 4), torch.zeros(2), torch.zeros(2, 5, 8), transformer_options=options)
    assert all(call.step is None and call.layout is not None for call in handler.calls)


def test_a_network_that_cannot_be_read_loses_its_layout_only() -> None:
    def reader(network: Any, given: Any) -> None:
        raise KeyError("context")

    handler = RecordingHandler()
    host = FakeHost()
    patched = install(host.model(), handler, layouts={"FakeFlux": reader})
    assert torch.equal(host.sample(patched), host.sample(host.model()))
    assert all(call.layout is None and call.step is not None and call.layer is not None for call in handler.calls)
    override = patched.model_options["transformer_options"][SLOT]
    assert dict(override.declines) == {"no token layout of FakeFlux: KeyError: 'context'": 3}
