import math

import pytest
import torch
from ttr_distill.embeddings import ScalarSinusoidalEmbedding


@pytest.mark.parametrize(("asked", "width"), [(32, 32), (7, 8), (2, 2), (0, 2), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_every_element_is_the_sine_or_cosine_at_its_frequency(asked: int, width: int, scale: float) -> None:
    values = [0.0, 0.37, 1.0, -2.5]
    actual = ScalarSinusoidalEmbedding(asked, input_scale=scale)(torch.tensor(values).reshape(2, 2))
    half = width // 2
    frequencies = [10000.0 ** (-i / max(1, half - 1)) for i in range(half)]
    expected = [
        [math.sin(scale * x * f) for f in frequencies] + [math.cos(scale * x * f) for f in frequencies] for x in values
    ]
    # A float32 angle near 2500 is exact to about 1e-4.
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=3e-4 if scale > 1 else 2e-6)


def test_frequencies_run_from_one_to_one_ten_thousandth() -> None:
    embedding = ScalarSinusoidalEmbedding(32)
    assert embedding.inv_freq[0] == 1.0
    assert math.isclose(float(embedding.inv_freq[-1]), 1e-4, rel_tol=1e-5)
    assert embedding.state_dict() == {}


def test_an_input_scale_spreads_sigma_over_the_frequencies() -> None:
    sigma = torch.linspace(0, 1, 101)
    moving = [
        int((ScalarSinusoidalEmbedding(32, input_scale=scale)(sigma).std(0) > 0.01).sum()) for scale in (1.0, 1000.0)
    ]
    assert moving[0] <= 12
    assert moving[1] >= 28


def test_a_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="input_scale must be finite"):
        ScalarSinusoidalEmbedding(8, input_scale=math.inf)
