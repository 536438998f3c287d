"""Students of three imagined layers, what trains them, and a host that samples with it."""

from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext
from torch import Tensor
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig, Distiller

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYERS = tuple(LayerKey("single", index) for index in range(3))
QUICK = CaptureConfig(query_cap=16, heldout_cap=8)


def new_bank(name: str, layers: tuple[LayerKey, ...] = LAYERS, seed: int = 0) -> StudentBank:
    settings = {"landmark_minimum": 8} if name == "hkr" else {"tile": 4, "top_k": 2}
    return StudentBank.for_layers(preset(name, **settings), layers, 2, 16, seed=seed)


@pytest.fixture
def bank_of() -> Callable[..., StudentBank]:
    return new_bank


@pytest.fixture
def distiller_of() -> Callable[..., Distiller]:
    """Distillers that train every layer in every step, none held out unless asked for."""

    def make(
        name: str = "near_far",
        layers: tuple[LayerKey, ...] = LAYERS,
        *,
        seed: int | None = 1,
        worker: int = 0,
        **config: object,
    ) -> Distiller:
        chosen = {"capture": QUICK, "min_swap_layers": len(layers), "heldout_period": 0, **config}
        settings = DistillConfig(**chosen)  # type: ignore[arg-type]
        return Distiller(new_bank(name, layers), ReadinessTracker(), settings, seed=seed, worker=worker)

    return make


@pytest.fixture
def sampling_run(make_call: CallMaker, native: Native) -> Callable[..., list[Tensor]]:
    """One run of a host: every layer in every step, in inference mode."""

    def run_once(
        distiller: Distiller,
        run: int,
        layers: tuple[LayerKey, ...],
        steps: int = 2,
        *,
        call: AttentionCall | None = None,
    ) -> list[Tensor]:
        outputs = []
        with torch.inference_mode():
            distiller.begin_run()
            try:
                for step in range(steps):
                    for layer in layers:
                        seed = 1000 * run + 10 * step
                        asked = call or make_call(seed, layer=layer, step=StepContext(1.0 - step / steps, 3.0))
                        outputs.append(distiller(asked, native))
            finally:
                distiller.end_run()
        return outputs

    return run_once
