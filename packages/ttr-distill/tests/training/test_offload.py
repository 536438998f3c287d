import pytest
import torch
from ttr_distill.grad import training_mode
from ttr_distill.training.offload import Arrival, HostCopies


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_copies_are_plain_complete_and_share_nothing(offload: bool, dtype: torch.dtype | None) -> None:
    with torch.inference_mode():
        source = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        with training_mode():
            copies = HostCopies(source.device, offload=offload)
            copy = copies.take(source, dtype)
            arrival = copies.arrival()
    arrival.wait()
    arrival.before_use_on(torch.device("cpu"))
    assert torch.equal(copy, source.to(dtype or torch.float32))
    assert not copy.is_inference()
    before = source.clone()
    copy.zero_()
    assert torch.equal(source, before)


class Event:
    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_the_host_waits_for_every_copy_once() -> None:
    first, second = Event(), Event()
    both = Arrival(second).also(Arrival(first))  # type: ignore[arg-type]
    assert Arrival(first).also(None) is not both  # type: ignore[arg-type]
    both.before_use_on(torch.device("cpu"))
    both.wait()
    assert (first.waited, second.waited) == (1, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_transfers_from_a_gpu_use_pinned_memory_and_arrive() -> None:
    source = torch.randn(2, 8, 4096, 64, device="cuda")
    copies = HostCopies(source.device, offload=True)
    kept = copies.take(source, torch.bfloat16)
    arrival = copies.arrival()
    assert kept.is_pinned()
    arrival.before_use_on(source.device)
    back = kept.to(source.device, non_blocking=True)
    assert torch.equal(back, source.to(torch.bfloat16))
    arrival.wait()
    assert torch.equal(kept, source.to(torch.bfloat16).cpu())
