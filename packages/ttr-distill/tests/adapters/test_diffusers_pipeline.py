import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attn_dispatch import StepContext, TokenLayout
from attn_dispatch.testing import RecordingHandler
from attn_kernels import TokenGrid
from torch import Tensor, nn
from ttr_distill.adapters.diffusers_pipeline import (
    PipelineSampler,
    PipelineSamples,
    load_pipeline,
    model_fingerprint,
)
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import StudentConfig, preset
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.replay import ReplaySample

diffusers = pytest.importorskip("diffusers")

IdsMaker = Callable[..., Tensor]


def letters(prompt: str, count: int, width: int) -> Tensor:
    """A text encoder without weights: every letter is a row of fixed noise."""
    rows = [torch.randn(width, generator=torch.Generator().manual_seed(ord(letter))) for letter in prompt[:count]]
    return torch.stack(rows + [torch.zeros(width)] * (count - len(rows)))


def make_pipeline(transformer: nn.Module, ids: Tensor) -> Any:
    """A genuine diffusers pipeline of transformer and scheduler whose prompts need no text encoder."""

    class LettersPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
        def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

        @torch.no_grad()
        def __call__(
            self,
            prompt: list[str],
            height: int,
            width: int,
            num_inference_steps: int,
            generator: list[torch.Generator],
            output_type: str,
            callback_on_step_end: Callable[..., dict[str, Tensor]],
            callback_on_step_end_tensor_inputs: list[str],
            guidance_scale: float = 3.5,
        ) -> SimpleNamespace:
            latents = torch.stack([torch.randn(12, 16, generator=one) for one in generator])
            text = torch.stack([letters(one, 5, 64) for one in prompt]) * guidance_scale
            self.scheduler.set_timesteps(num_inference_steps)
            for index, timestep in enumerate(self.scheduler.timesteps):
                velocity = self.transformer(
                    hidden_states=latents,
                    encoder_hidden_states=text,
                    pooled_projections=text[:, 0],
                    timestep=(timestep / 1000).expand(len(prompt)),
                    img_ids=ids,
                    txt_ids=torch.zeros(5, 3),
                    return_dict=False,
                )[0]
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                latents = callback_on_step_end(self, index, timestep, {"latents": latents})["latents"]
            images = latents.reshape(-1, 3, 8, 8).sigmoid() if output_type == "pt" else latents
            assert (height, width) == (48, 64)
            return SimpleNamespace(images=images)

    return LettersPipeline(transformer, diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.fixture
def sampler(flux: nn.Module, fractional_ids: IdsMaker) -> PipelineSampler:
    pipeline = make_pipeline(flux, fractional_ids(3, 4))
    return PipelineSampler(pipeline, height=48, width=64, steps=3, guidance=2.0)


def test_prompt_and_seed_fix_an_image_and_steps_are_reported(sampler: PipelineSampler) -> None:
    steps: list[int] = []
    both = sampler.sample(["fox", "cat"], [1, 2], on_step=steps.append)
    alone = sampler.sample(["cat"], [2])
    assert steps == [0, 1, 2]
    assert (both.latent.shape, both.images.shape) == ((2, 12, 16), (2, 3, 8, 8))
    torch.testing.assert_close(both.latent[1:], alone.latent)
    assert not torch.allclose(both.latent[:1], alone.latent)
    sampler.decode = False
    latent, images = sampler.sample(["cat"], [2])
    assert torch.equal(latent, images)
    assert torch.equal(latent, alone.latent)


def test_a_handler_gets_every_attention_and_one_run(sampler: PipelineSampler) -> None:
    handler = RecordingHandler()
    plain = sampler.sample(["fox"], [1])
    assert torch.equal(sampler.sample(["fox"], [1], handler).latent, plain.latent)
    assert (handler.begun, handler.ended, len(handler.calls)) == (1, 1, 15)
    assert tuple(call.layer for call in handler.calls[:5]) == sampler.layers
    sigmas = [call.step.sigma for call in handler.calls[::5] if call.step is not None]
    assert sigmas == sorted(sigmas, reverse=True)
    assert handler.calls[0].step == StepContext(1.0, 2.0, (3, 4))
    assert (sampler.heads, sampler.width) == (4, 32)


def test_a_run_ends_also_when_it_fails(sampler: PipelineSampler) -> None:
    handler = RecordingHandler()

    def stop(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(["fox"], [1], handler, on_step=stop)
    assert (handler.begun, handler.ended) == (1, 1)


def test_a_pipeline_is_distilled_and_unchanged_after_it(sampler: PipelineSampler) -> None:
    bank = StudentBank.for_layers(preset("near_far", tile=2, top_k=1), sampler.layers, sampler.heads, sampler.width)
    before = sampler.sample(["fox"], [1])
    fingerprint = model_fingerprint(sampler.pipeline.transformer)
    distiller = Distiller(bank, ReadinessTracker())
    with torch.inference_mode():
        for seed in range(2):
            sampler.sample(["cat"], [seed], distiller)
    distiller.raise_pending()
    assert distiller.updates > 0
    assert distiller.declined == {}
    assert torch.equal(sampler.sample(["fox"], [1]).latent, before.latent)
    assert model_fingerprint(sampler.pipeline.transformer) == fingerprint


def test_what_does_not_fit_is_said(sampler: PipelineSampler) -> None:
    with pytest.raises(ValueError, match="SimpleNamespace has no transformer"):
        PipelineSampler(SimpleNamespace(unet=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="steps must be at least 1, got 48, 64, 0"):
        PipelineSampler(sampler.pipeline, height=48, width=64, steps=0)
    with pytest.raises(ValueError, match="got 2 prompts, 1 seeds"):
        sampler.sample(["a", "b"], [0])


def test_a_fingerprint_is_of_the_weights(new_flux: Callable[[], nn.Module]) -> None:
    first, second = new_flux(), new_flux()
    assert model_fingerprint(first) == model_fingerprint(second)
    assert model_fingerprint(torch.compile(first, backend="eager")) == model_fingerprint(second)  # type: ignore[arg-type]
    assert model_fingerprint(new_flux().to(torch.bfloat16)) == model_fingerprint(second), "whatever it was loaded as"
    with torch.no_grad():
        second.get_parameter("proj_out.bias")[0] += 1.0
    assert model_fingerprint(first) != model_fingerprint(second)
    with pytest.raises(ValueError, match="take the fingerprint before the weights are offloaded"):
        model_fingerprint(new_flux().to("meta"))


def learned_from(sampler: PipelineSampler, student: StudentConfig) -> tuple[ReplaySample, PipelineSamples]:
    """Distil on one image, which stays as it is; give the first call captured and the image."""
    bank = StudentBank.for_layers(student, sampler.layers, sampler.heads, sampler.width)
    distiller = Distiller(bank, ReadinessTracker())
    plain = sampler.sample(["a fox"], [1])
    assert torch.equal(sampler.sample(["a fox"], [1], distiller).latent, plain.latent)
    distiller.raise_pending()
    assert distiller.declined == {}
    assert distiller.updates > 0
    return distiller.replay.samples()[0], plain


def test_a_flux_pipeline_is_loaded_from_a_folder_and_distilled(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_flux_pipeline(tmp_path, transformers).save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(str(tmp_path / "model"), dtype=torch.float32)
    sampler = PipelineSampler(pipeline, height=64, width=48, steps=2, options={"max_sequence_length": 16})
    sample, plain = learned_from(sampler, preset("near_far"))
    assert [(grid.rows, grid.columns) for grid in sample.layout.grids] == [(16, 12)]
    assert plain.images.shape == (1, 3, 64, 48)


def test_a_flux_2_pipeline_is_distilled(flux_2: Callable[..., nn.Module]) -> None:
    pytest.importorskip("transformers")

    class WithoutTextEncoder(diffusers.Flux2Pipeline):  # type: ignore[misc, name-defined]
        def encode_prompt(self, prompt: list[str], **_: object) -> tuple[Tensor, Tensor]:
            text = torch.stack([letters(one, 7, 24) for one in prompt])
            return text, self._prepare_text_ids(text)

    vae = diffusers.AutoencoderKLFlux2(latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = WithoutTextEncoder(scheduler, vae, None, None, flux_2())
    sampler = PipelineSampler(pipeline, height=96, width=128, steps=2, guidance=2.5)
    sample, plain = learned_from(sampler, preset("near_far", tile=2, top_k=1))
    assert sample.layout == TokenLayout(55, ((0, 7),), (TokenGrid(7, 6, 8),))
    assert sample.step == StepContext(1.0, 2.5, (6, 8))
    assert plain.images.shape == (1, 3, 96, 128)


def tiny_flux_pipeline(folder: Path, transformers: Any) -> Any:
    letters_of = [chr(97 + index) for index in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters_of, *(f"{letter}</w>" for letter in letters_of)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    clip = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    t5 = transformers.T5Config(vocab_size=len(words), d_model=24, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae,
        transformers.CLIPTextModel(clip),
        tokenizer,
        transformers.T5EncoderModel(t5),
        tokenizer,
        transformer,
    )
