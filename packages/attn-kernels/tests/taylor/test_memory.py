"""Measured memory against stated memory: every tensor that an operation makes, while its storage lives."""

import pytest
import torch
from attn_kernels import TaylorConfig, taylor_attention, taylor_memory
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that did not exist before."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def measure(sizes, terms, config, dtype=torch.float32, mask=None):
    batch, heads, queries, keys, width, value_width = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, width), (keys, width), (keys, value_width))
    q, k, v = (torch.randn(batch, heads, *shape, generator=generator).to(dtype) for shape in shapes)
    with LiveBytes(q, k, v) as live:
        part = taylor_attention(q, k, v, terms=terms, scale=0.3, key_mask=mask, config=config, impl="blocked")
    return live.peak - part.out.nbytes - part.lse.nbytes


SIZES = [((1, 4, 300, 400, 16, 16), 3), ((1, 4, 300, 400, 16, 16), 4), ((2, 2, 100, 300, 8, 24), 5)]
CHUNKS = [{}, {"key_chunk": 128, "feature_chunk": 256, "value_chunk": 8}]


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"coefficients": "hermite"},
        {"store": "bfloat16"},
        {"blocks": 2, "mode": "independent"},
        {"coefficients": "hermite", "dtype": torch.bfloat16, "masked": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("sizes", "terms"), SIZES)
def test_what_is_held_is_stated(sizes, terms, settings, path):
    settings = dict(settings)
    dtype, masked = settings.pop("dtype", torch.float32), settings.pop("masked", False)
    mask = torch.ones(sizes[0], sizes[3], dtype=torch.bool) if masked else None
    for chunks in CHUNKS:
        config = TaylorConfig(path=path, **settings, **chunks)
        held = measure(sizes, terms, config, dtype, mask)
        stated = taylor_memory(*sizes, terms=terms, dtype=dtype, config=config)
        assert held <= stated <= 3 * held


def test_streaming_holds_a_small_part_of_the_sums():
    sizes = (1, 1, 100, 100, 20, 20)
    chunked = TaylorConfig(path="streaming", feature_chunk=512, key_chunk=64)
    full, streaming = (measure(sizes, 5, config) for config in (TaylorConfig(path="full"), chunked))
    assert streaming < full / 5


def test_memory_does_not_grow_with_the_batch_or_the_square_of_the_tokens():
    config = TaylorConfig()
    small = taylor_memory(1, 4, 4096, 4096, 16, 16, config=config)
    assert taylor_memory(8, 4, 4096, 4096, 16, 16, config=config) == small
    assert taylor_memory(1, 4, 65536, 65536, 16, 16, config=config) - small < 4 * 6 * 4 * 65536 + 1
    with pytest.raises(ValueError, match="terms"):
        taylor_memory(1, 4, 4096, 4096, 16, 16, terms=0)
