"""Sample with a diffusers pipeline: prompts and seeds in, images out, a handler inside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import torch
from attn_dispatch import AttentionHandler, LayerKey
from torch import Tensor, nn

from ttr_distill.adapters.diffusers import DiffusersHost, attention_shape, layers

Offload = Literal["none", "model", "sequential"]
_SAMPLED_BYTES = 4096
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class PipelineSamples(NamedTuple):
    """Finished samples.

    Attributes:
        latent: ``[B, ...]`` as the pipeline keeps it, after the last step.
        images: ``[B, 3, H, W]`` in ``[0, 1]``; the latent again if nothing was decoded.
    """

    latent: Tensor
    images: Tensor


class PipelineSampler:
    """Draws images with a text-to-image pipeline of a diffusion transformer (Flux, Flux2, SD3 and their kin).

    Prompt and seed fix an image, whatever else is in the batch. The pipeline is used as it is: offloaded, compiled,
    with its own scheduler; nothing of it is changed.

    Args:
        pipeline: A ``diffusers`` pipeline with a ``transformer``.
        height: In pixels.
        width: In pixels.
        steps: Denoising steps.
        guidance: Guidance scale; ``None`` = the pipeline's own default.
        decode: Decode images; distilling needs none.
        options: Further arguments of the pipeline's call.

    Raises:
        ValueError: The pipeline has no transformer whose attention can be reached.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        height: int = 1024,
        width: int = 1024,
        steps: int = 20,
        guidance: float | None = None,
        decode: bool = True,
        options: Mapping[str, Any] = _NOTHING,
    ) -> None:
        transformer = getattr(pipeline, "transformer", None)
        if not isinstance(transformer, nn.Module):
            raise ValueError(
                f"{type(pipeline).__name__} has no transformer; give a pipeline of a diffusion transformer"
            )
        if min(height, width, steps) < 1:
            raise ValueError(f"height, width and steps must be at least 1, got {height}, {width}, {steps}")
        self.pipeline = pipeline
        self.layers: tuple[LayerKey, ...] = layers(transformer)
        self.heads, self.head_width = attention_shape(transformer)
        self.steps = steps
        self.guidance = guidance
        self.decode = decode
        self._call = {"height": height, "width": width, "num_inference_steps": steps, **options}

    @property
    def width(self) -> int:
        """Width of an attention head."""
        return self.head_width

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        handler: AttentionHandler | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> PipelineSamples:
        """Draw one image for each pair of prompt and seed.

        Args:
            prompts: What to draw.
            seeds: One seed a prompt.
            handler: Answers every attention of the transformer; its run begins and ends here.
            on_step: Called after each step with its number, from 0.

        Raises:
            ValueError: Numbers of prompts and seeds differ, or none was given.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"give one seed a prompt and at least one, got {len(prompts)} prompts, {len(seeds)} seeds")
        latest: dict[str, Tensor] = {}

        def after_step(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            latest["latent"] = values["latents"]
            if on_step is not None:
                on_step(index)
            return values

        arguments = dict(self._call)
        if self.guidance is not None:
            arguments["guidance_scale"] = self.guidance
        with self._attached(handler):
            output = self.pipeline(
                prompt=list(prompts),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt" if self.decode else "latent",
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["latents"],
                **arguments,
            )
        images = torch.as_tensor(output.images)
        # Copies made outside inference mode are ordinary tensors, which a later training step may save.
        return PipelineSamples(latest.get("latent", images).clone(), images.clone())

    @contextmanager
    def _attached(self, handler: AttentionHandler | None) -> Iterator[None]:
        if handler is None:
            yield
            return
        host = DiffusersHost(
            self.pipeline.transformer, handler, cfg_scale=1.0 if self.guidance is None else self.guidance
        )
        handler.begin_run()
        try:
            with host:
                yield
        finally:
            handler.end_run()


def load_pipeline(model: str, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Load a pipeline from a folder or by its name on the hub, into host memory; ``place_pipeline`` moves it.

    Args:
        model: Path or name.
        dtype: Data type of the weights.

    Raises:
        ImportError: diffusers, or what the pipeline's text encoders need, is not installed; the message says what.
        OSError: There is no such model.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError('real models need diffusers: pip install "ttr-distill[diffusers]"') from error
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (ImportError, ValueError, AttributeError) as error:
        if "transformers" not in str(error):
            raise
        raise ImportError(f"the text encoders of {model} need transformers: pip install transformers") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def place_pipeline(pipeline: Any, device: torch.device | str, offload: Offload = "none") -> None:
    """Move a pipeline to a device, or let its weights move there when they are needed.

    Args:
        pipeline: From ``load_pipeline``.
        device: Where to run.
        offload: Keep weights in host memory and move a model (``"model"``) or a layer (``"sequential"``) to the
            device when it runs; needs accelerate.

    Raises:
        ImportError: Offloading needs accelerate, which is not installed.
    """
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def model_fingerprint(transformer: nn.Module) -> str:
    """Identify a model by its weights: a sha256 over names, shapes and a sample of the values of every tensor.

    Take it before weights are offloaded layer by layer: those then have no values to read.

    Raises:
        ValueError: A tensor has no values.
    """
    digest = hashlib.sha256()
    original = cast("nn.Module", getattr(transformer, "_orig_mod", transformer))
    for name, tensor in sorted(original.state_dict().items()):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} has no values here; take the fingerprint before the weights are offloaded")
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED_BYTES)
        # In float32, so that a model is the same whatever it was loaded as, as far as its own precision goes.
        digest.update(flat[::stride][:_SAMPLED_BYTES].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
