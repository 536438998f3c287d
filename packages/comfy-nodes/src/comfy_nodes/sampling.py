"""ComfyUI's sampler as the controller's training sees it: same seeds, same noise, any handler."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from attn_dispatch import AttentionCall, AttentionHandler, LayerKey, NativeAttention, StepContext
from attn_dispatch.adapters.comfyui import install, uninstall
from torch import Tensor

OnStep = Callable[[], None]

_PREVIEW_EDGE = 64


@dataclass(frozen=True)
class SamplerSettings:
    """What a KSampler is set to.

    Attributes:
        steps: Diffusion steps.
        cfg: Guidance scale.
        sampler_name: Of the host's samplers.
        scheduler: Of the host's schedulers.
        denoise: Share of the schedule that is run.
    """

    steps: int = 20
    cfg: float = 1.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    denoise: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or int(self.steps * self.denoise) < 1:
            raise ValueError(
                f"the sampler has no steps: {self.steps} steps at denoise {self.denoise:g}; raise steps or denoise"
            )


@dataclass(frozen=True)
class ComfySamples:
    """What a sampling made.

    Attributes:
        latent: ``[B, C, h, w]`` or with frames ``[B, C, T, h, w]``, on the CPU.
        images: ``[B, 3, H, W]`` in [0, 1]; small stand-ins from the latent where decoding was not asked for.
    """

    latent: Tensor
    images: Tensor


class ComfySampler:
    """Makes images as a KSampler node does, a handler attached to the model or not.

    A prompt is the number of an entry of the latent batch, as text: the conditioning is the same for all of them.

    Args:
        model: ComfyUI's ``ModelPatcher``; stays as it is.
        positive: The host's conditioning.
        negative: The host's conditioning.
        latent: The host's latent: ``samples`` ``[B, C, h, w]``, and ``noise_mask`` and ``batch_index`` if any.
        layers: Layers that a controller routes.
        settings: Of the sampler.
        key: Under which handlers are installed; one that is there under it is left out.
        decode: Turns a latent into images ``[B, H, W, 3]``.
        decode_rollouts: Whether every sampling is decoded, which an image metric needs; else only ``decoded`` does.
        per_step: Whether handlers see each diffusion step, or the first one for the whole sampling.
        on_step: Called after every diffusion step.
    """

    def __init__(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        *,
        layers: Sequence[LayerKey],
        settings: SamplerSettings,
        key: str,
        decode: Callable[[Tensor], Tensor],
        decode_rollouts: bool = False,
        per_step: bool = True,
        on_step: OnStep | None = None,
    ) -> None:
        samples = latent.get("samples")
        if not isinstance(samples, Tensor) or samples.ndim < 4:
            raise ValueError("the latent holds no samples [B, C, h, w]; link an empty latent or an encoded image")
        self.model = uninstall(model, key=key)
        self.positive, self.negative = positive, negative
        self.latent = {**latent, "samples": _full_latent(self.model, latent)}
        self.layers = tuple(layers)
        self.settings = settings
        self.key = key
        self.decode = decode
        self.decode_rollouts = decode_rollouts
        self.per_step = per_step
        self.on_step = on_step
        self.runs = 0
        self.last_latent: Tensor | None = None

    @property
    def entries(self) -> tuple[str, ...]:
        """The prompts: one for each entry of the latent batch."""
        return tuple(str(index) for index in range(self.latent["samples"].shape[0]))

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], handler: AttentionHandler | None = None
    ) -> ComfySamples:
        """Sample one entry for each prompt and seed; with a handler every attention goes through it."""
        model = self.model
        if handler is not None:
            model = install(model, handler if self.per_step else FirstStep(handler), key=self.key)
        made = [self._sample_one(model, int(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        latent = torch.cat(made)
        if handler is not None:
            self.last_latent = latent
        return ComfySamples(latent, self.decoded(latent) if self.decode_rollouts else small_pictures(latent))

    def decoded(self, latent: Tensor) -> Tensor:
        """Decode a latent ``[B, C, h, w]`` into images ``[B, 3, H, W]`` in [0, 1]; frames become images."""
        pixels = self.decode(latent)
        if pixels.ndim == 5:
            pixels = pixels.flatten(0, 1)
        return pixels[..., :3].movedim(-1, 1).float().cpu().clamp(0.0, 1.0)

    def _sample_one(self, model: Any, index: int, seed: int) -> Tensor:
        import comfy.sample

        item = _entry(self.latent, index)
        samples = item["samples"]
        inds = item.get("batch_index")
        noise = comfy.sample.prepare_noise(samples, seed, inds)
        settings = self.settings
        made: Tensor = comfy.sample.sample(
            model,
            noise,
            settings.steps,
            settings.cfg,
            settings.sampler_name,
            settings.scheduler,
            self.positive,
            self.negative,
            samples,
            denoise=settings.denoise,
            noise_mask=item.get("noise_mask"),
            callback=self._after_step,
            disable_pbar=True,
            seed=seed,
        )
        self.runs += 1
        return made.float().cpu()

    def _after_step(self, *_: Any) -> None:
        if self.on_step is not None:
            self.on_step()


class FirstStep:
    """An ``AttentionHandler`` that shows another one the first diffusion step for the whole run.

    Args:
        handler: Who answers.
    """

    def __init__(self, handler: AttentionHandler) -> None:
        self.handler = handler
        self._first: StepContext | None = None

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``call`` with ``[B, H, Nq, Dv]``."""
        if call.step is None:
            return self.handler(call, native)
        if self._first is None:
            self._first = call.step
        return self.handler(replace(call, step=self._first), native)

    def begin_run(self) -> None:
        """Wait for the first step, and pass on."""
        self._first = None
        self.handler.begin_run()

    def end_run(self) -> None:
        """Pass on."""
        self.handler.end_run()


def small_pictures(latent: Tensor) -> Tensor:
    """Make small pictures ``[B, 3, h, w]`` in [0, 1] from mixtures of a latent's channels ``[B, C, ..., h, w]``."""
    if latent.ndim == 5:
        latent = latent[:, :, 0]
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(latent.shape[1], 3, generator=generator) * latent.shape[1] ** -0.5
    pictures = torch.sigmoid(torch.einsum("bchw,cd->bdhw", latent.float().cpu(), mixture))
    edge = max(pictures.shape[-2:])
    if edge > _PREVIEW_EDGE:
        pictures = torch.nn.functional.interpolate(pictures, scale_factor=_PREVIEW_EDGE / edge, mode="area")
    return pictures


def _full_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """Give an empty latent the channels and size that the model has, as the host's sampler node does."""
    import comfy.sample

    fix = comfy.sample.fix_empty_latent_channels
    known = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    ratios = {name: latent.get(name) for name in known if name in inspect.signature(fix).parameters}
    full: Tensor = fix(model, latent["samples"], **ratios)
    return full


def _entry(latent: dict[str, Any], index: int) -> dict[str, Any]:
    """Take one entry of a latent batch, its mask and its place in the batch included."""
    count = latent["samples"].shape[0]
    entry: dict[str, Any] = {"samples": latent["samples"][index : index + 1]}
    mask = latent.get("noise_mask")
    if mask is not None:
        entry["noise_mask"] = mask[index : index + 1] if mask.shape[0] == count else mask
    places = latent.get("batch_index")
    if places is not None:
        entry["batch_index"] = [places[index]]
    return entry
