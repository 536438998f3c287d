"""Near-far attention on real queries, keys and values: every layer of the embedded teacher at 1,024 image tokens."""

from collections import defaultdict

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, NativeAttention
from attn_kernels import NearFarConfig, cosine_distance, near_far_attention
from torch import Tensor
from ttr_distill.tiny import TinySampler, heldout_prompts, load_teacher

CONFIGS = {
    "chosen": NearFarConfig(tile=4, radius=1, top_k=10),
    "small tiles": NearFarConfig(tile=2, radius=1, top_k=0),
    "plain": NearFarConfig(tile=4, radius=1, top_k=0),
}


class Meter:
    """Returns the teacher's output; measures near-far and the mean of v on the same calls."""

    def __init__(self) -> None:
        self.distances: dict[str, dict[LayerKey, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def begin_run(self) -> None:
        pass

    def end_run(self) -> None:
        pass

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        teacher = native(call)
        assert call.layer is not None
        assert call.layout is not None
        outputs = {
            name: near_far_attention(call.q, call.k, call.v, grids=call.layout.grids, config=config).out
            for name, config in CONFIGS.items()
        }
        outputs["mean of v"] = call.v.mean(dim=2, keepdim=True).expand_as(teacher)
        for name, output in outputs.items():
            self.distances[name][call.layer].append(cosine_distance(output, teacher).mean())
        return teacher

    def mean(self, name: str) -> float:
        """Mean over layers, both guidance halves and all steps."""
        layers = self.distances[name]
        assert len(layers) == 6
        return torch.stack([torch.stack(values).mean() for values in layers.values()]).mean().item()


@pytest.fixture(scope="module")
def meter() -> Meter:
    meter = Meter()
    sampler = TinySampler(load_teacher(), rows=32, columns=32, steps=4, guidance=3.0)
    sampler.sample(heldout_prompts()[:2], [2000, 2001], meter)
    return meter


def test_the_mean_of_v_is_far_off(meter: Meter) -> None:
    assert meter.mean("mean of v") > 0.1


def test_chosen_tiles_reach_two_thousandths(meter: Meter) -> None:
    assert meter.mean("chosen") <= 0.002


def test_small_tiles_without_choice_reach_five_thousandths(meter: Meter) -> None:
    assert meter.mean("small tiles") <= 0.005


def test_choosing_tiles_is_worth_a_factor_of_two(meter: Meter) -> None:
    assert meter.mean("chosen") < 0.5 * meter.mean("plain")
