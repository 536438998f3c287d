"""What ComfyUI's wrappers tell a ``ComfyOverride``: where a run begins and ends, which step it is, where tokens lie."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from attn_dispatch.adapters.comfyui_blocks import name_blocks
from attn_dispatch.adapters.comfyui_layout import (
    BINARY_MASKS,
    CROSS_ATTENDING,
    SHARED_NAMES,
    LayoutReader,
    named_arguments,
)
from attn_dispatch.adapters.comfyui_override import FACTS, INSTALLED, OVERRIDE, ComfyOverride, ModelFacts, Seat, reaches
from attn_dispatch.call import AttentionHandler, StepContext, TokenLayout

OUTER_SAMPLE = "outer_sample"
"""ComfyUI's name of the wrapper around a whole sampling run."""

DIFFUSION_MODEL = "diffusion_model"
"""ComfyUI's name of the wrapper around one call of the network."""

CFG = "attn_dispatch_cfg"
"""Key in ``transformer_options`` of the guidance scale of the run."""


class HostWrappers:
    """The two wrappers that serve one override.

    Both take whatever the host passes and pass it on. The run's ``begin_run`` and ``end_run`` are called in
    try/finally; an error or interrupt of the host passes as it is, even if ``end_run`` fails too.

    The noise level lies on the device, and reading it waits for what was launched before: once per evaluation of the
    network by the sampler, however many attention calls and conditions that evaluation has.

    A handler with ``end_step() -> bool`` is asked after each model call whether what it answered must not be used; the
    call is then made again (see ``attn_dispatch.finite``).

    Args:
        override: Whom they serve.
        layouts: Reader of the token layout by class name of the network.
    """

    def __init__(self, override: ComfyOverride, layouts: Mapping[str, LayoutReader]) -> None:
        self.override = override
        self.layouts = layouts
        self._read: tuple[Tensor, float | None] | None = None
        self._outside_look: Callable[..., Any] | None = None
        self._outside_settle: Callable[[], bool] | None = None
        self._prepare()

    def around_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap a sampling run: ``OUTER_SAMPLE``."""
        self._prepare()
        handler = self.override.handler
        guider = getattr(executor, "class_obj", None)
        options = _options_of(guider)
        before = options.get(CFG)
        options[CFG] = _guidance(guider)
        try:
            with _Run(handler):
                return executor(*args, **kwargs)
        finally:
            self._read = None
            if before is None:
                options.pop(CFG, None)
            else:
                options[CFG] = before

    def around_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap one call of the network: ``DIFFUSION_MODEL``."""
        (self._outside_look or self._look)(executor, args, kwargs)
        output = executor(*args, **kwargs)
        while (self._outside_settle or self._settle)():
            output = executor(*args, **kwargs)
        return output

    def _prepare(self) -> None:
        """Keep ``torch.compile`` out of the reading too, once it has been imported."""
        self.override.prepare()
        if self._outside_look is None and "torch._dynamo" in sys.modules:
            self._outside_look = torch.compiler.disable(self._look)  # type: ignore[no-untyped-call]
            self._outside_settle = torch.compiler.disable(self._settle)  # type: ignore[no-untyped-call]

    def _settle(self) -> bool:
        """Whether the model call must be made again."""
        end_step = getattr(self.override.handler, "end_step", None)
        return end_step is not None and bool(end_step())

    def _look(self, executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write what is known of this model call where the override finds it, and see that the override is asked."""
        options = next((one for one in (*kwargs.values(), *args) if isinstance(one, dict) and INSTALLED in one), None)
        override = self.override
        if options is None or options[INSTALLED].get(override.key) is not override:
            return
        if not reaches(options.get(OVERRIDE), override):
            # A node behind this one took the slot: it becomes part of what native attention is.
            options[OVERRIDE] = Seat(override, options.get(OVERRIDE))
        name_blocks(getattr(executor, "class_obj", None), options)
        options[FACTS] = {**options.get(FACTS, {}), override.key: self._facts(executor, args, kwargs, options)}

    def _facts(
        self, executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> ModelFacts:
        network = getattr(executor, "class_obj", None)
        name = type(network).__name__
        x = args[0] if args else kwargs.get("x")
        layout: TokenLayout | None = None
        reader = self.layouts.get(name)
        binary = False
        if reader is not None:
            try:
                given = named_arguments(executor.original, args, kwargs)
                layout = reader(network, given)
                mask = given.get("attention_mask")
                binary = name in BINARY_MASKS and isinstance(mask, Tensor) and not mask.is_floating_point()
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                # A fork or a newer host: approximations that need a layout stay away, the run goes on.
                self.override.declines[f"no token layout of {name}: {type(error).__name__}: {error}"] += 1
        named = name not in SHARED_NAMES and (layout is not None or name not in CROSS_ATTENDING)
        return ModelFacts(self._step(options, x), layout, named, binary)

    def _step(self, options: Mapping[str, Any], x: Any) -> StepContext | None:
        sigma = self._sigma(options.get("sigmas"))
        if sigma is None:
            return None
        rows = x.shape[0] if isinstance(x, Tensor) else 0
        size = (x.shape[-2], x.shape[-1]) if isinstance(x, Tensor) and x.ndim >= 4 else (0, 0)
        conditions = tuple(int(one) for one in options.get("cond_or_uncond") or ())
        if conditions and rows % len(conditions):
            conditions = ()
        return StepContext(sigma, options.get(CFG, 1.0), size, conditions)

    def _sigma(self, sigmas: Any) -> float | None:
        """Read the noise level, once per tensor; ``None`` if the samples of the batch have different ones."""
        if not isinstance(sigmas, Tensor) or sigmas.numel() == 0:
            return None
        if self._read is None or self._read[0] is not sigmas:
            values = set(sigmas.flatten().tolist())
            self._read = (sigmas, values.pop() if len(values) == 1 else None)
        return self._read[1]


class _Run:
    """``begin_run`` on entering, ``end_run`` on leaving; what stopped the run passes even if ``end_run`` fails too.

    Args:
        handler: Who is told.
    """

    def __init__(self, handler: AttentionHandler) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        try:
            self.handler.begin_run()
        except BaseException:
            self.handler.end_run()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.handler.end_run()
        finally:
            if error is not None:
                raise error


def _options_of(guider: Any) -> dict[str, Any]:
    """``transformer_options`` of this run, of which the host makes those of every model call."""
    model_options = getattr(guider, "model_options", None)
    if not isinstance(model_options, dict):
        return {}
    options: dict[str, Any] = model_options.setdefault("transformer_options", {})
    return options


def _guidance(guider: Any) -> float:
    """Guidance scale; of a guider with two, the one between the prompts and the rest."""
    for name in ("cfg1", "cfg"):
        scale = getattr(guider, name, None)
        if isinstance(scale, int | float):
            return float(scale)
    return 1.0
