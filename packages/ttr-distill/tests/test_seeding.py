import torch
from ttr_distill.seeding import stream


def draw(*names: object, seed: int = 3) -> list[float]:
    return torch.rand(5, generator=stream(seed, *names)).tolist()


def test_equal_names_give_equal_streams_and_others_do_not() -> None:
    assert draw("student", 1) == draw("student", 1)
    assert draw("student", 1) != draw("student", 2)
    assert draw("student", 1) != draw("student", 1, seed=4)
    # Names are separated: ("ab", "c") is not ("a", "bc").
    assert draw("ab", "c") != draw("a", "bc")


def test_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    stream(5, "anything")
    assert torch.equal(torch.rand(3), expected)
