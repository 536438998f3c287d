"""A stand-in for ComfyUI, for tests that must run without it: a model patcher, a guider and a tiny Flux.

It keeps the host's conventions where an adapter touches them: the override is found in the keyword
``transformer_options`` of an attention call, options are copied through dicts and lists and other objects are shared,
wrappers are called as ``wrapper(executor, *args, **kwargs)``, block names are written into one dict in place, and the
negative prompt stands first in the batch. Where ComfyUI is at hand, the same tests run against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attn_dispatch.testing import TinyDiT

Wrapper = Callable[..., Any]


def copy_options(value: Any) -> Any:
    """Copy through dicts and lists; everything else is shared."""
    if isinstance(value, dict):
        return {key: copy_options(one) for key, one in value.items()}
    return [copy_options(one) for one in value] if isinstance(value, list) else value


def overridable(function: Wrapper) -> Wrapper:
    """Make an attention function look for an override, once per call, in ``transformer_options``."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            options = kwargs.get("transformer_options") or {}
            if "optimized_attention_override" in options:
                return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    return attention


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attend as a backend of the host does.

    Args:
        q: ``[B, Nq, heads * D]``, or ``[B, heads, Nq, D]`` with ``skip_reshape``; ``k`` and ``v`` likewise.
        k: See ``q``.
        v: See ``q``.
        heads: Number of heads.
        mask: ``[Nq, Nk]``, ``[B, Nq, Nk]`` or ``[B, H, Nq, Nk]``.
        attn_precision: Ignored.
        skip_reshape: Layout of the inputs.
        skip_output_reshape: Layout of the output.
        **kwargs: ``scale`` is used, the rest ignored.

    Returns:
        ``[B, Nq, heads * Dv]``, or ``[B, heads, Nq, Dv]`` with ``skip_output_reshape``.
    """
    if not skip_reshape:
        q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class FakeExecutor:
    """Calls wrappers in order, then the original.

    Args:
        original: What is wrapped.
        class_obj: Its object.
        wrappers: Outermost first.
    """

    def __init__(self, original: Wrapper, class_obj: object, wrappers: Sequence[Wrapper]) -> None:
        self.original = original
        self.class_obj = class_obj
        self.wrappers = tuple(wrappers)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Start with the first wrapper."""
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](FakeExecutor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)

    __call__ = execute


class FakeFlux(nn.Module):
    """A tiny Flux with the host's signature, token order and block names.

    Args:
        seed: Seed of the weights.
        named: Write block names into the options, as newer versions of ComfyUI do.
    """

    patch_size = 2

    def __init__(self, *, seed: int = 0, named: bool = True) -> None:
        super().__init__()
        self.named = named
        self.tiny = TinyDiT(channels=16, seed=seed)
        self.attention = overridable(plain_attention)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: object = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Predict a velocity.

        Args:
            x: ``[B, 4, height, width]`` latent.
            timestep: ``[B]`` noise levels.
            context: ``[B, T, 8]`` text tokens.
            y: ``[B, ...]``; ignored.
            guidance: ``[B]``; ignored.
            ref_latents: Reference latents ``[1, 4, height, width]``.
            control: Ignored.
            transformer_options: Of this model call.
            **kwargs: ``attention_mask`` is handed to every attention.

        Returns:
            ``[B, 4, height, width]``.
        """
        options = {} if transformer_options is None else transformer_options
        found = options.get("wrappers", {}).get("diffusion_model", {})
        wrappers = [one for several in found.values() for one in several]
        executor = FakeExecutor(self._forward, self, wrappers)
        output: Tensor = executor.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)
        return output

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: object = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else dict(transformer_options)
        mask = kwargs.get("attention_mask")
        tiny = self.tiny
        parts = [self._tokens(x), *(self._tokens(one).expand(x.shape[0], -1, -1) for one in ref_latents or ())]
        ids = [_ids(x, 0), *(_ids(one, 1 + index) for index, one in enumerate(ref_latents or ()))]
        image = tiny.x_embedder(torch.cat(parts, 1)) + tiny.time_embed(timestep[:, None, None].to(x.dtype))
        text = tiny.context_embedder(context)
        words, own = text.shape[1], parts[0].shape[1]
        angles = tiny.angles(torch.cat([torch.zeros(words, 3), *ids])).to(x.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor | None) -> Tensor:
            out: Tensor = self.attention(
                q, k, v, q.shape[1], skip_reshape=True, mask=given, transformer_options=options
            )
            return out.view(*out.shape[:2], q.shape[1], -1).transpose(1, 2)

        def run(place: tuple[str, int], block: nn.Module, image: Tensor, text: Tensor | None) -> tuple[Tensor, Any]:
            def original(args: dict[str, Any]) -> dict[str, Any]:
                img, txt = block(args["img"], args.get("txt"), args["pe"], args["attn_mask"], attend)
                return {"img": img, "txt": txt}

            replaced = options.get("patches_replace", {}).get("dit", {}).get(place)
            given = {"img": image, "txt": text, "pe": angles, "attn_mask": mask, "transformer_options": options}
            out = original(given) if replaced is None else replaced(given, {"original_block": original})
            return out["img"], out.get("txt")

        for index, block in enumerate(tiny.transformer_blocks):
            self._name(options, "double", index)
            image, text = run(("double_block", index), block, image, text)
        joined = torch.cat([text, image], 1)
        if self.named:
            options["img_slice"] = [words, joined.shape[1]]
        for index, block in enumerate(tiny.single_transformer_blocks):
            self._name(options, "single", index)
            joined, _ = run(("single_block", index), block, joined, None)
        rows, columns = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
        out: Tensor = tiny.proj_out(joined[:, words : words + own])
        out = out.reshape(-1, rows, columns, 4, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, :, : x.shape[2], : x.shape[3]]

    def _name(self, options: dict[str, Any], kind: str, index: int) -> None:
        if self.named:
            options.update(block_type=kind, block_index=index)

    def _tokens(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _ids(x: Tensor, number: int) -> Tensor:
    rows, columns = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    grid = torch.cartesian_prod(torch.arange(rows) + 40.0 * number, torch.arange(columns) * 1.0)
    return functional.pad(grid.reshape(-1, 2), (1, 0), value=float(number))


class FakeModelPatcher:
    """A model with options and wrappers, of which clones share the weights.

    Args:
        network: The diffusion network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Wrapper]]] = {}

    def clone(self) -> FakeModelPatcher:
        """Make a patcher of the same network with options and wrappers of its own."""
        other = FakeModelPatcher(self.network)
        other.model_options = copy_options(self.model_options)
        other.wrappers = copy_options(self.wrappers)
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Wrapper) -> None:
        """Append a wrapper."""
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        """Remove all wrappers of a key."""
        self.wrappers.get(kind, {}).pop(key, None)


class FakeGuider:
    """Samples by Euler steps with classifier-free guidance.

    Args:
        patcher: The model.
        cfg: Guidance scale; at 1.0 the negative prompt is not evaluated.
        together: Evaluate both prompts in one batch, else in one call each.
    """

    def __init__(self, patcher: FakeModelPatcher, cfg: float = 1.0, *, together: bool = True) -> None:
        self.patcher = patcher
        self.cfg = cfg
        self.together = together
        self.model_options = copy_options(patcher.model_options)

    def sample(
        self,
        noise: Tensor,
        sigmas: Tensor,
        positive: Tensor,
        negative: Tensor,
        ref_latents: list[Tensor] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            noise: ``[B, 4, height, width]``.
            sigmas: ``[steps + 1]`` noise levels, falling.
            positive: ``[1, T, 8]`` text tokens.
            negative: ``[1, T, 8]`` text tokens.
            ref_latents: Reference latents ``[1, 4, height, width]``.
            on_step: Called with the number of each finished step; may raise to interrupt.

        Returns:
            ``[B, 4, height, width]``.
        """
        wrappers = [one for several in self.patcher.wrappers.get("outer_sample", {}).values() for one in several]

        def outer_sample(x: Tensor, levels: Tensor, *, latent_shapes: object = None) -> Tensor:
            for step in range(len(levels) - 1):
                velocity = self._velocity(x, levels[step], levels, positive, negative, ref_latents)
                x = x + (levels[step + 1] - levels[step]) * velocity
                if on_step is not None:
                    on_step(step)
            return x

        output: Tensor = FakeExecutor(outer_sample, self, wrappers).execute(noise, sigmas, latent_shapes=[noise.shape])
        return output

    def _velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        sigmas: Tensor,
        positive: Tensor,
        negative: Tensor,
        ref_latents: list[Tensor] | None,
    ) -> Tensor:
        batch = x.shape[0]
        level = sigma.expand(batch)
        prompts = {0: positive, 1: negative} if self.cfg != 1 else {0: positive}
        groups = [sorted(prompts, reverse=True)] if self.together else [[kind] for kind in prompts]
        found: dict[int, Tensor] = {}
        for group in groups:
            options = copy_options(self.model_options["transformer_options"])
            options.update(
                wrappers=copy_options(self.patcher.wrappers),
                sigmas=level,
                sample_sigmas=sigmas,
                cond_or_uncond=list(group),
            )
            text = torch.cat([prompts[kind].expand(batch, -1, -1) for kind in group])
            out = self.patcher.network(
                torch.cat([x] * len(group)),
                level.repeat(len(group)),
                context=text,
                ref_latents=ref_latents,
                control=None,
                transformer_options=options,
            )
            found.update(zip(group, out.chunk(len(group)), strict=True))
        return found[0] if self.cfg == 1 else found[1] + self.cfg * (found[0] - found[1])
