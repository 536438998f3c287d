"""Two hundred sampling runs in a row, in short fewer: no memory that grows, no hook that stays."""

import gc
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionHandler, AttentionRouter, FidelityProbe, Route
from attn_dispatch.adapters.comfyui import install, uninstall
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher
from attn_dispatch.adapters.comfyui_layout import LAYOUTS
from attn_dispatch.backends import (
    NearFarBackend,
    TaylorBackend,
    TaylorBackendConfig,
)
from attn_kernels import NearFarConfig
from torch import nn
from ttr_distill import DistillConfig, Distiller, ReadinessTracker, StudentBank, preset
from ttr_distill.tiny import TinySampler, load_teacher, training_prompts

from .conftest import LONG

WARM = 50 if LONG else 30
"""Runs after which caches are full and every code path was taken."""

WINDOWS = 3
WINDOW = 50 if LONG else 30
RUNS = WARM + WINDOWS * WINDOW

CONSTANT = 3000
"""Bytes that a window may take however many runs it has: the interpreter's free lists, and the counts themselves."""

READERS = {**LAYOUTS, "FakeFlux": LAYOUTS["Flux"]}


class Held(NamedTuple):
    """What is alive: bytes of Python, objects that the collector knows, bytes of tensors."""

    python_bytes: int
    objects: int
    tensor_bytes: int


def held() -> Held:
    gc.collect()
    objects = gc.get_objects()
    tensors = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in objects if type(one) is torch.Tensor
    }
    return Held(tracemalloc.get_traced_memory()[0], len(objects), sum(tensors.values()))


def growth(run: Callable[[int], None]) -> Held:
    """What every window of runs after the warm ones left behind, at least.

    What is kept run after run shows in each window; a few kilobytes that the interpreter takes once show in one.
    """
    tracemalloc.start()
    try:
        for index in range(WARM):
            run(index)
        states = [held()]
        for window in range(WINDOWS):
            for index in range(WINDOW):
                run(WARM + window * WINDOW + index)
            states.append(held())
    finally:
        tracemalloc.stop()
    grown = [[late - early for early, late in zip(*pair, strict=True)] for pair in pairwise(states)]
    return Held(*(min(column) for column in zip(*grown, strict=True)))


def assert_steady(found: Held, *, bytes_a_run: int = 30) -> None:
    """One list entry for each attention call would show."""
    assert found.python_bytes < CONSTANT + bytes_a_run * WINDOW, f"{found.python_bytes / WINDOW:.0f} bytes a run"
    assert found.objects < WINDOW, f"{found.objects / WINDOW:.1f} objects a run"
    assert found.tensor_bytes < 8 * WINDOW, f"{found.tensor_bytes / WINDOW:.0f} bytes of tensors a run"


def router() -> AttentionRouter:
    return AttentionRouter([Route(NearFarBackend(NearFarConfig(2, 1, 1)))])


def taylor() -> AttentionRouter:
    config = TaylorBackendConfig(min_tokens=0, P=3, sub_head_blocks=1, log_shapes=False, log_steps=False)
    backend = TaylorBackend(config)

    def forget(call: AttentionCall) -> None:
        """Its records of steps are kept, up to a fixed number; here it is everything else that must not grow."""
        backend.steps.clear()

    return AttentionRouter([Route(backend, (forget,))])


@pytest.mark.parametrize(
    "handler", [router, taylor, lambda: FidelityProbe(router())], ids=["router", "taylor", "probe"]
)
def test_sampling_in_comfyui(handler: Callable[[], AttentionHandler]) -> None:
    model = FakeModelPatcher(FakeFlux())
    patched = install(model, handler(), layouts=READERS)
    draw = torch.Generator().manual_seed(3)
    noise, *texts = (torch.randn(*shape, generator=draw) for shape in ((1, 4, 8, 10), (1, 5, 8), (1, 5, 8)))

    def run(index: int) -> None:
        with torch.inference_mode():
            FakeGuider(patched, 2.0).sample(noise, torch.tensor([1.0, 0.0]), *texts)

    assert_steady(growth(run))


def test_installing_and_uninstalling() -> None:
    model = FakeModelPatcher(FakeFlux())
    before = repr(model.model_options), repr(model.wrappers)

    def run(index: int) -> None:
        patched = install(install(model, router(), layouts=READERS), taylor(), key="second", layouts=READERS)
        plain = uninstall(uninstall(patched), key="second")
        assert (repr(plain.model_options), set().union(*plain.wrappers.values())) == (before[0], set())

    assert_steady(growth(run))
    assert (repr(model.model_options), repr(model.wrappers)) == before


def hooks(module: nn.Module) -> int:
    """Hooks of all kinds on a module and everything in it."""
    return sum(len(value) for part in module.modules() for name, value in vars(part).items() if name.endswith("_hooks"))


def test_distilling_the_embedded_teacher() -> None:
    """The replay is full before the count begins; the metrics have a length of their own."""
    teacher = load_teacher()
    sampler = TinySampler(teacher, rows=4, columns=4, steps=1, guidance=1.0)
    before = hooks(teacher.transformer)
    bank = StudentBank.for_layers(preset("near_far", tile=2, top_k=1), sampler.layers, sampler.heads, sampler.width)
    distiller = Distiller(bank, ReadinessTracker(), DistillConfig(replay_bytes=200_000, heldout_period=0))
    # Rows of metrics are kept, up to ten thousand; here it is everything else that must not grow.
    distiller.metrics = type(distiller.metrics)(maxlen=50)
    prompt = [training_prompts()[0]]

    def run(index: int) -> None:
        sampler.sample(prompt, [index], distiller)
        assert hooks(teacher.transformer) == before

    # Counters grow and tuples are tracked anew; a sample, a call or a layout would be many times this.
    assert_steady(growth(run), bytes_a_run=800)
    distiller.raise_pending()
    assert distiller.runs == RUNS
    assert 0 < sum(distiller.replay.layer_bytes(layer) for layer in sampler.layers) <= 200_000


def test_an_error_in_a_run_leaves_no_hook() -> None:
    teacher = load_teacher()
    sampler = TinySampler(teacher, rows=4, columns=4, steps=2)
    before = hooks(teacher.transformer)

    def stop(step: int) -> None:
        raise KeyboardInterrupt

    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            sampler.sample([training_prompts()[0]], [0], router(), on_step=stop)
    assert hooks(teacher.transformer) == before
