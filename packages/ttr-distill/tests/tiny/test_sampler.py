from __future__ import annotations

import pytest
import torch
from attn_dispatch.call import AttentionCall, LayerKey, NativeAttention
from torch import Tensor
from ttr_distill.tiny import TinySampler, TinyTeacher, heldout_prompts, retrieval_accuracy


class Recorder:
    """Calls native, and notes what it saw."""

    def __init__(self, factor: float = 1.0, fail_at: int = -1) -> None:
        self.factor, self.fail_at = factor, fail_at
        self.calls: list[AttentionCall] = []
        self.events: list[str] = []

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        if len(self.calls) == self.fail_at:
            raise RuntimeError("boom")
        self.calls.append(call)
        return native(call) * self.factor

    def begin_run(self) -> None:
        self.events.append("begin")

    def end_run(self) -> None:
        self.events.append("end")


@pytest.fixture
def sampler(teacher: TinyTeacher) -> TinySampler:
    return TinySampler(teacher, rows=6, columns=8, steps=3)


PROMPTS = ("red apple on blue", "panda")


def test_same_seed_same_image_alone_and_in_a_batch(sampler: TinySampler) -> None:
    batch = sampler.sample(PROMPTS, [5, 9])
    assert batch.latent.shape == (2, 48, 16)
    assert batch.images.shape == (2, 3, 24, 32)
    assert torch.equal(batch.latent, sampler.sample(PROMPTS, [5, 9]).latent)
    alone = sampler.sample(PROMPTS[1:], [9])
    torch.testing.assert_close(alone.latent[0], batch.latent[1], rtol=0, atol=1e-3)
    assert (sampler.sample(PROMPTS[1:], [10]).latent - alone.latent).abs().max() > 0.1


def test_native_handler_is_bit_equal_and_sees_every_layer(sampler: TinySampler) -> None:
    plain, handler = sampler.sample(PROMPTS, [5, 9]), Recorder()
    handled = sampler.sample(PROMPTS, [5, 9], handler=handler)
    assert torch.equal(plain.latent, handled.latent)
    assert handler.events == ["begin", "end"]
    assert [call.layer for call in handler.calls] == list(sampler.layers) * sampler.steps
    assert sampler.layers == (*(LayerKey("double", i) for i in range(2)), *(LayerKey("single", i) for i in range(4)))
    first = handler.calls[0]
    assert first.q.shape == (4, sampler.heads, 12 + 48, sampler.width)
    assert first.step is not None
    assert first.layout is not None
    assert first.step.cfg_scale == 3.0
    assert first.step.cond_or_uncond == (0, 1)
    assert first.layout.text == ((0, sampler.text_tokens),)
    assert [(grid.start, grid.rows, grid.columns) for grid in first.layout.grids] == [(12, 6, 8)]
    sigmas = [call.step.sigma for call in handler.calls[:: len(sampler.layers)] if call.step is not None]
    assert sigmas == pytest.approx(sampler.sigmas[:-1].tolist())


def test_handler_answers_count_and_leave_no_trace(sampler: TinySampler) -> None:
    plain = sampler.sample(PROMPTS, [5, 9])
    assert not torch.allclose(sampler.sample(PROMPTS, [5, 9], handler=Recorder(0.5)).latent, plain.latent, atol=1e-2)
    failing = Recorder(fail_at=8)
    with pytest.raises(RuntimeError, match="boom"):
        sampler.sample(PROMPTS, [5, 9], handler=failing)
    assert failing.events == ["begin", "end"]
    assert torch.equal(sampler.sample(PROMPTS, [5, 9]).latent, plain.latent)


def test_without_guidance_only_conditional_rows_run(teacher: TinyTeacher) -> None:
    handler = Recorder()
    TinySampler(teacher, rows=4, columns=4, steps=2, guidance=1.0).sample(PROMPTS, [1, 2], handler=handler)
    assert handler.calls[0].q.shape[0] == 2
    assert handler.calls[0].step is not None
    assert handler.calls[0].step.cond_or_uncond == (0,)


def test_guidance_combines_conditional_and_unconditional(sampler: TinySampler, teacher: TinyTeacher) -> None:
    latent = sampler.noise(PROMPTS, [5, 9])
    sigma = float(sampler.sigmas[1])
    with torch.inference_mode():
        with_caption = teacher.velocity(latent, sigma, teacher.encode(PROMPTS), 6, 8)
        without = teacher.velocity(latent, sigma, teacher.encode(["", ""]), 6, 8)
    expected = 3.0 * with_caption - 2.0 * without
    torch.testing.assert_close(sampler.velocity(latent, 1, PROMPTS), expected, rtol=0, atol=1e-4)


def test_trajectory_passes_through_the_samples(sampler: TinySampler) -> None:
    path = sampler.trajectory(PROMPTS, [5, 9])
    assert path.latents.shape == (4, 2, 48, 16)
    assert torch.equal(path.latents[0], sampler.noise(PROMPTS, [5, 9]))
    torch.testing.assert_close(path.latents[-1], sampler.sample(PROMPTS, [5, 9]).latent, rtol=0, atol=1e-4)


def test_samples_are_ordinary_tensors(sampler: TinySampler) -> None:
    """A training step may save them for its backward pass."""
    latent = sampler.sample(PROMPTS, [5, 9]).latent
    weight = torch.ones(16, requires_grad=True)
    torch.autograd.backward((latent * weight).square().sum())
    assert weight.grad is not None


def test_steps_are_announced(sampler: TinySampler) -> None:
    seen: list[int] = []
    sampler.sample(PROMPTS, [5, 9], on_step=seen.append)
    assert seen == [0, 1, 2]


def test_draws_what_the_prompts_say(teacher: TinyTeacher) -> None:
    prompts = heldout_prompts()[:4]
    images = TinySampler(teacher, rows=16, columns=16, steps=8).sample(prompts, range(4)).images
    assert retrieval_accuracy(images, prompts) == 1.0


def test_wrong_arguments(sampler: TinySampler, teacher: TinyTeacher) -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        sampler.sample(PROMPTS, [1])
    with pytest.raises(ValueError, match="unknown words"):
        sampler.sample(["zeppelin"], [1])
    with pytest.raises(ValueError, match="steps"):
        TinySampler(teacher, steps=0)
    with pytest.raises(ValueError, match="step must be from 0 to 2"):
        sampler.velocity(sampler.noise(PROMPTS, [1, 2]), 3, PROMPTS)
