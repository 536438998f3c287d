"""How far each method is from exact attention on real queries, keys and values: those of the embedded teacher."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from attn_dispatch import AttentionCall, NativeAttention
from attn_dispatch.backends import TaylorBackend, TaylorBackendConfig
from attn_kernels import cosine_distance, relative_l2
from forward_methods import NEAR_FAR, Choice, hkr, near_far, near_far_name
from torch import Tensor
from ttr_distill import DistillConfig, Distiller, ReadinessTracker, UpdateConfig
from ttr_distill.student import StudentBackend
from ttr_distill.tiny import TinySampler, heldout_prompts, load_teacher, training_prompts

SIDE = 32
"""Rows and columns of image tokens: the largest size that the teacher was trained at."""


@dataclass(frozen=True)
class Distance:
    """Distance of a method from exact attention, in the calls of sampling with exact attention.

    Attributes:
        method: Name of the method.
        image_tokens: Image tokens.
        cosine_distance: Mean over queries, heads, layers and steps.
        relative_l2: Mean over layers and steps.
        updates: How often each layer's student was updated before; ``None`` if nothing learns.
    """

    method: str
    image_tokens: int
    cosine_distance: float
    relative_l2: float
    updates: int | None = None


class Comparison:
    """An attention handler that returns the exact answer and compares every method's with it.

    Args:
        choices: The methods by name; none is left out for not paying off.
    """

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self.choices = choices
        self.found: dict[str, list[Tensor]] = {name: [] for name in choices}

    def begin_run(self) -> None:
        """Part of the handler's protocol."""

    def end_run(self) -> None:
        """Part of the handler's protocol."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer exactly.

        Raises:
            ValueError: A method cannot answer this call.
        """
        exact = native(call)
        for name, choice in self.choices.items():
            refusal = choice.backend.refuses(call)
            if refusal is not None:
                raise ValueError(f"{name} cannot answer a call of the teacher: {refusal}")
            output = choice.backend(call)
            self.found[name].append(torch.stack([cosine_distance(output, exact).mean(), relative_l2(output, exact)]))
        return exact


def learn(sampler: TinySampler, backend: StudentBackend, images: int) -> int:
    """Distil students while the teacher draws images, with one update after every call.

    Returns:
        Updates of each layer.
    """
    layers = sampler.layers
    config = DistillConfig(update=UpdateConfig(learning_rate=2e-3), min_swap_layers=len(layers), heldout_period=0)
    distiller = Distiller(backend.bank, ReadinessTracker(), config, seed=0)
    prompts = training_prompts()
    for image in range(images):
        sampler.sample([prompts[17 * image % len(prompts)]], [image], distiller)
        distiller.raise_pending()
    return distiller.updates // len(layers)


def distances(*, side: int = SIDE, steps: int = 4, prompts: int = 1, images: int = 8) -> list[Distance]:
    """Sample held-out prompts with exact attention and compare every method on the way.

    Args:
        side: Rows and columns of image tokens.
        steps: Sampling steps of the comparison.
        prompts: Held-out prompts to compare on.
        images: Images of eight steps that the learned student is distilled on.
    """
    teacher = load_teacher()
    taylor = TaylorBackend(TaylorBackendConfig.recommended())
    fresh, learned = hkr(teacher.transformer), hkr(teacher.transformer)
    assert isinstance(learned.backend, StudentBackend)
    updates = learn(TinySampler(teacher, rows=side, columns=side, steps=8, guidance=3.0), learned.backend, images)
    choices = {near_far_name(config): near_far(config) for config in NEAR_FAR}
    choices |= {"hkr, untrained": fresh, "hkr": learned, "taylor": Choice(taylor, taylor.work)}
    comparison = Comparison(choices)
    sampler = TinySampler(teacher, rows=side, columns=side, steps=steps, guidance=3.0)
    with torch.inference_mode():
        sampler.sample(heldout_prompts()[:prompts], [2000 + index for index in range(prompts)], comparison)
    means = {name: torch.stack(found).mean(dim=0).tolist() for name, found in comparison.found.items()}
    done = {"hkr, untrained": 0, "hkr": updates}
    return [Distance(name, side * side, cosine, relative, done.get(name)) for name, (cosine, relative) in means.items()]
