import pytest
import torch
from ttr_distill.student.presets import build_student, preset
from ttr_distill.training.memory import MemoryLadder, is_out_of_memory


def test_each_rung_gives_up_what_it_says_and_the_last_is_off() -> None:
    ladder, generator = MemoryLadder(), torch.Generator().manual_seed(0)
    student = build_student(preset("hkr", landmark_minimum=8), 2, 16)
    seen, sentences = [], []
    for _ in range(7):
        rows = {ladder.rows(2, generator).start for _ in range(20)}
        with ladder.fewer_landmarks(student):
            cap = student.config.landmark_maximum  # type: ignore[union-attr]
        kept = ladder.kept_samples
        seen.append((ladder.rung, ladder.queries(512), ladder.queries(16), len(rows), ladder.query_chunk, cap, kept))
        assert ladder.off == (ladder.rung == 5)
        sentences.append(ladder.step_down())
    assert seen == [
        (0, 512, 16, 1, None, 0, None),
        (1, 128, 16, 1, None, 0, None),
        (2, 128, 16, 2, 32, 0, None),
        (3, 128, 16, 2, 32, 512, None),
        (4, 128, 16, 2, 32, 512, 1),
        (5, 128, 16, 2, 32, 512, 1),
        (5, 128, 16, 2, 32, 512, 1),
    ]
    assert sentences[4] == sentences[5] == "training is off, the teacher answers"
    assert len(set(sentences)) == 5
    assert MemoryLadder(1).queries(64) == 32


@pytest.mark.parametrize(("own", "least", "limit"), [(0, 8, 512), (0, 600, 600), (100, 8, 50), (100, 80, 80)])
def test_landmarks_are_halved_within_the_context_alone(own: int, least: int, limit: int) -> None:
    student = build_student(preset("hkr", landmark_minimum=least, landmark_maximum=own), 2, 16)
    before = student.config
    with MemoryLadder(3).fewer_landmarks(student):
        assert student.config.landmark_maximum == limit  # type: ignore[union-attr]
    assert student.config is before
    other = build_student(preset("near_far"), 2, 16)
    with MemoryLadder(3).fewer_landmarks(other):
        pass


def test_rungs_are_checked() -> None:
    with pytest.raises(ValueError, match="rung must be 0 to 5, got 6"):
        MemoryLadder(6)


def test_errors_that_mean_no_memory() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyError("x")):
        assert not is_out_of_memory(error)


def test_an_allocation_that_the_host_refuses_is_one_of_them() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
