import pytest
import torch
from attn_dispatch.native import Arch, Tier, auto_detect_precision, default_device, detect_arch
from attn_dispatch.native.arch import precision_of
from attn_dispatch.native.catalog import PRIORITY, SDPA, candidates


@pytest.mark.parametrize(
    ("capability", "tier", "precision"),
    [
        ((6, 1), Tier.OLDER, torch.float32),
        ((7, 0), Tier.OLDER, torch.float16),
        ((7, 5), Tier.OLDER, torch.float16),
        ((8, 0), Tier.AMPERE, torch.bfloat16),
        ((8, 9), Tier.AMPERE, torch.bfloat16),
        ((9, 0), Tier.HOPPER, torch.bfloat16),
        ((10, 0), Tier.BLACKWELL, torch.bfloat16),
        ((12, 0), Tier.BLACKWELL, torch.bfloat16),
    ],
)
def test_a_compute_capability_has_a_tier_and_a_precision(
    capability: tuple[int, int], tier: Tier, precision: torch.dtype
) -> None:
    arch = Arch.of_capability(*capability)
    assert arch == Arch(tier, capability)
    assert precision_of(arch) is precision


@pytest.mark.parametrize(
    ("tier", "precision"),
    [(Tier.ROCM, torch.bfloat16), (Tier.XPU, torch.bfloat16), (Tier.MPS, torch.float16), (Tier.CPU, torch.float32)],
)
def test_other_devices_have_a_precision(tier: Tier, precision: torch.dtype) -> None:
    assert precision_of(Arch(tier)) is precision


@pytest.mark.parametrize(
    ("kind", "tier"), [("cpu", Tier.CPU), ("mps", Tier.MPS), ("xpu", Tier.XPU), ("meta", Tier.CPU)]
)
def test_a_device_is_recognised_by_its_type(kind: str, tier: Tier) -> None:
    assert detect_arch(torch.device(kind)) == Arch(tier)


def test_the_default_device_is_one_that_tensors_can_be_made_on() -> None:
    assert torch.ones(1, device=default_device()).device == default_device()
    assert auto_detect_precision() is auto_detect_precision(default_device())


# Compute capability -> order of preference, as promised to users of earlier dispatchers.
PROMISED = {
    (10, 0): ["sage3", "flash_fp8", "sage2", "flash"],
    (12, 0): ["sage3", "flash_fp8", "sage2", "flash"],
    (9, 0): ["flash_fp8", "sage2", "flash"],
    (8, 9): ["sage2", "flash"],
    (8, 0): ["sage2", "flash"],
    (7, 5): [],
}


@pytest.mark.parametrize("capability", PROMISED)
def test_auto_keeps_the_promised_order(capability: tuple[int, int]) -> None:
    promised = PROMISED[capability]
    tried = PRIORITY[Arch.of_capability(*capability).tier]
    assert [name for name in tried if name in promised] == promised
    assert SDPA not in tried  # It is what remains, not a choice.


@pytest.mark.parametrize("tier", Tier)
def test_every_tier_has_a_priority_and_tries_only_what_runs_there(tier: Tier) -> None:
    arch = Arch(tier, (12, 0))
    for name in PRIORITY[tier]:
        assert any(tier in one.tiers for one in candidates(name, arch)), name
