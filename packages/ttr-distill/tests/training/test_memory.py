import pytest
import torch
from ttr_distill.training.memory import MemoryLadder


def test_each_rung_gives_up_what_it_says_and_the_last_is_off() -> None:
    ladder, generator = MemoryLadder(), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(5):
        rows = [ladder.rows(2, generator) for _ in range(20)]
        seen.append(
            (ladder.rung, ladder.queries(512), ladder.queries(16), len({row.start for row in rows}), ladder.off)
        )
        sentence = ladder.step_down()
    assert seen == [
        (0, 512, 16, 1, False),
        (1, 128, 16, 1, False),
        (2, 128, 16, 2, False),
        (3, 128, 16, 2, True),
        (3, 128, 16, 2, True),
    ]
    assert sentence == "training is off, the teacher answers"
    assert MemoryLadder(1).queries(64) == 32


def test_rungs_are_checked() -> None:
    with pytest.raises(ValueError, match="rung must be 0 to 3, got 4"):
        MemoryLadder(4)
