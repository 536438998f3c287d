"""Two handlers at work on two threads give what each gives alone."""

import threading
from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionRouter, Route
from attn_dispatch.adapters.comfyui import install
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher
from attn_dispatch.adapters.comfyui_layout import LAYOUTS
from attn_dispatch.backends import NearFarBackend
from attn_kernels import NearFarConfig
from torch import Tensor
from ttr_distill import DistillConfig, Distiller, ReadinessTracker, StudentBank, preset
from ttr_distill.tiny import TinySampler, TinyTeacher, load_teacher, training_prompts

STEPS = 2


@pytest.fixture(scope="module")
def teacher() -> TinyTeacher:
    return load_teacher()


def side_by_side(*works: Callable[[], Tensor]) -> list[Tensor]:
    """Start all at once, each on its own thread, and collect what they return."""
    results: list[Tensor | None] = [None] * len(works)
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def run(index: int) -> None:
        try:
            ready.wait(30)
            results[index] = works[index]()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    found = [result for result in results if result is not None]
    assert len(found) == len(works)
    return found


def distil(teacher: TinyTeacher, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw two images with a distiller watching: the latents, and the students' weights."""
    sampler = TinySampler(teacher, rows=8, columns=8, steps=STEPS)
    bank = StudentBank.for_layers(preset("near_far", tile=2, top_k=1), sampler.layers, sampler.heads, sampler.width)
    config = DistillConfig(min_swap_layers=len(sampler.layers))
    distiller = Distiller(bank, ReadinessTracker(), config, seed=seed)
    prompts = training_prompts()[seed : seed + 2]
    latents = [sampler.sample([prompt], [seed], distiller).latent for prompt in prompts]
    distiller.raise_pending()
    assert distiller.updates > 0
    return torch.cat(latents), {name: value.clone() for name, value in bank.state_dict().items()}


def test_two_distillers_share_a_teacher(teacher: TinyTeacher) -> None:
    alone = [distil(teacher, seed) for seed in (0, 5)]
    together: list[dict[str, Tensor]] = [{}, {}]

    def work(index: int, seed: int) -> Tensor:
        latents, together[index] = distil(teacher, seed)
        return latents

    latents = side_by_side(lambda: work(0, 0), lambda: work(1, 5))
    for index in (0, 1):
        assert torch.equal(latents[index], alone[index][0])
        assert together[index].keys() == alone[index][1].keys()
        assert all(torch.equal(together[index][name], value) for name, value in alone[index][1].items())


def test_a_router_and_no_router_share_a_teacher(teacher: TinyTeacher) -> None:
    """The thread without a handler gets exact attention, bit for bit, while the other is approximated."""
    sampler = TinySampler(teacher, rows=8, columns=8, steps=STEPS)
    prompt = [training_prompts()[3]]

    def router() -> AttentionRouter:
        return AttentionRouter([Route(NearFarBackend(NearFarConfig(2, 1, 0)))])

    exact, near_far = sampler.sample(prompt, [1]).latent, sampler.sample(prompt, [1], router()).latent
    assert not torch.equal(exact, near_far)
    works = [
        lambda: torch.stack([sampler.sample(prompt, [1]).latent for _ in range(3)]),
        lambda: torch.stack([sampler.sample(prompt, [1], router()).latent for _ in range(3)]),
    ]
    plain, routed = side_by_side(*works)
    assert all(torch.equal(one, exact) for one in plain)
    assert all(torch.equal(one, near_far) for one in routed)


def test_two_routers_of_one_comfyui_model(long: bool) -> None:
    network = FakeFlux()
    readers = {**LAYOUTS, "FakeFlux": LAYOUTS["Flux"]}
    configs = (NearFarConfig(2, 1, 0), NearFarConfig(3, 0, 1))

    def sample(config: NearFarConfig) -> Tensor:
        router = AttentionRouter([Route(NearFarBackend(config))])
        patcher = install(FakeModelPatcher(network), router, layouts=readers)
        draw = torch.Generator().manual_seed(3)
        noise = torch.randn(1, 4, 18, 20, generator=draw)
        texts = [torch.randn(1, 5, 8, generator=draw) for _ in range(2)]
        with torch.inference_mode():
            out = FakeGuider(patcher, 2.0).sample(noise, torch.tensor([1.0, 0.6, 0.0]), *texts)
        assert set(router.report.counts()) == {"near_far"}
        return out

    alone = [sample(config) for config in configs]
    assert not torch.equal(*alone)
    for _ in range(20 if long else 3):
        together = side_by_side(lambda: sample(configs[0]), lambda: sample(configs[1]))
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
