import pytest
import torch
from ttr_controller.teacher import TeacherCache
from ttr_controller.testing import ToySampler


def test_each_pair_is_sampled_once():
    toy = ToySampler(torch.ones(3, 2))
    cache = TeacherCache(toy)
    first = cache.get(["a", "b"], [0, 1])
    assert toy.calls == 6
    torch.testing.assert_close(first.latent, toy.sample(["a", "b"], [0, 1]).latent)
    toy.calls = 0
    again = cache.get(["b", "a", "a"], [1, 0, 0])
    assert toy.calls == 0
    assert torch.equal(again.latent, first.latent[[1, 0, 0]])
    assert torch.equal(again.images, first.images[[1, 0, 0]])
    mixed = cache.get(["a", "a"], [0, 7])
    assert toy.calls == 6
    torch.testing.assert_close(mixed.latent, toy.sample(["a", "a"], [0, 7]).latent)


def test_each_size_has_its_own_samples_and_contexts():
    toy = ToySampler(torch.ones(3, 2))
    cache = TeacherCache(toy)
    small = cache.get(["a"], [0]).images
    toy.rows, toy.columns = 4, 6
    assert cache.contexts == ()
    assert cache.get(["a"], [0]).images.shape == (1, 3, 4, 6)
    assert cache.contexts == toy.contexts()
    toy.rows, toy.columns = 3, 4
    toy.calls = 0
    assert torch.equal(cache.get(["a"], [0]).images, small)
    assert toy.calls == 0
    assert cache.contexts == toy.contexts()


def test_contexts_are_those_of_the_sampler():
    toy = ToySampler(torch.ones(3, 2))
    cache = TeacherCache(toy)
    assert cache.contexts == ()
    cache.get(["a"], [0])
    assert cache.contexts == toy.contexts()


def test_capacity_drops_the_longest_unused():
    toy = ToySampler(torch.ones(3, 2))
    cache = TeacherCache(toy, capacity=2)
    for seed in (0, 1, 0, 2):
        cache.get(["a"], [seed])
    toy.calls = 0
    cache.get(["a", "a"], [0, 2])
    assert toy.calls == 0
    cache.get(["a"], [1])
    assert toy.calls > 0
    assert cache.get(["a", "b", "c"], [1, 2, 3]).latent.shape[0] == 3
    with pytest.raises(ValueError, match="capacity 0"):
        TeacherCache(toy, capacity=0)
