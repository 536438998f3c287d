"""Near-far attention over several ranks is that of one rank, and what travels is what is foretold."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attn_kernels import NearFarConfig, Partial, TokenGrid, near_far_attention
from attn_kernels.sequence_parallel import SequenceParallelNearFar
from attn_kernels.sequence_shards import Shards, received_bytes
from attn_kernels.testing import make_qkv

MOST = 4
BATCH, HEADS, WIDTH, VALUE_WIDTH = 2, 3, 16, 8


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    grid: TokenGrid
    config: NearFarConfig
    dtype: torch.dtype = torch.float64
    impl: str = "reference"

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return make_qkv(
            BATCH, HEADS, self.grid.stop, WIDTH, value_width=VALUE_WIDTH, logit_std=3.0, dtype=self.dtype, seed=5,
            smooth_grid=self.grid,
        )  # fmt: skip

    @property
    def shards(self) -> Shards:
        return Shards.even(self.grid, self.config, self.ranks)


CASES = (
    Case("two ranks", 2, TokenGrid(5, 16, 12), NearFarConfig(4, 1, 0)),
    Case("two ranks, chosen tiles", 2, TokenGrid(5, 16, 12), NearFarConfig(4, 1, 2)),
    Case("three ranks, ragged tiles", 3, TokenGrid(7, 27, 13), NearFarConfig(4, 1, 3)),
    Case("four ranks, float32", 4, TokenGrid(5, 32, 12), NearFarConfig(4, 1, 2), torch.float32, "blocked"),
    Case("four ranks, pooled text", 4, TokenGrid(5, 30, 11), NearFarConfig((3, 4), 1, 2, "pooled")),
    Case("four ranks, two near, no text", 4, TokenGrid(0, 40, 9), NearFarConfig(4, 2, 1)),
    Case("four ranks, nothing near", 4, TokenGrid(3, 16, 12), NearFarConfig(4, 0, 40)),
    Case("one rank", 1, TokenGrid(5, 16, 12), NearFarConfig(4, 1, 2)),
)


def answer(rank: int, address: str, folder: str) -> None:
    """One process: answers every case that it is a rank of and writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=MOST)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(1, MOST + 1)}
    for case in CASES:
        if rank < case.ranks:
            attention = SequenceParallelNearFar(case.shards, group=groups[case.ranks], impl=case.impl)
            part = attention(*(case.shards.local(x, rank) for x in case.tensors()))
            torch.save((part, attention.received), Path(folder, f"{case.name} {rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    command = [sys.executable, __file__, f"file://{folder / 'store'}", str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(MOST)]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * MOST, "\n".join(errors)
    return folder


def read(folder: Path, case: Case) -> list[tuple[Partial, int]]:
    return [torch.load(folder / f"{case.name} {rank}.pt", weights_only=False) for rank in range(case.ranks)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_ranks_answer_as_one(answers: Path, case: Case) -> None:
    expected = near_far_attention(*case.tensors(), grids=[case.grid], config=case.config, impl="reference")
    for rank, (part, _) in enumerate(read(answers, case)):
        out, lse = case.shards.local(expected.out, rank), case.shards.local(expected.lse.unsqueeze(-1), rank)
        torch.testing.assert_close(part.out, out, rtol=0, atol=1e-5)
        torch.testing.assert_close(part.lse, lse[..., 0].to(part.lse.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_much_travels_as_foretold(answers: Path, case: Case) -> None:
    for rank, (_, received) in enumerate(read(answers, case)):
        foretold = received_bytes(
            case.shards, rank, batch=BATCH, heads=HEADS, width=WIDTH, value_width=VALUE_WIDTH,
            itemsize=case.dtype.itemsize,
        )  # fmt: skip
        assert received == foretold.total
        assert (foretold.total > 0) == (case.ranks > 1)


def test_chosen_tiles_of_other_ranks_matter() -> None:
    # Were no choice of another rank's tile among the cases, the ring could be left out and nothing would be seen.
    case = CASES[1]
    q, k, v = case.tensors()
    without = near_far_attention(q, k, v, grids=[case.grid], config=NearFarConfig(4, 1, 0), impl="reference").out
    chosen = near_far_attention(q, k, v, grids=[case.grid], config=case.config, impl="reference").out
    assert (without - chosen).abs().max() > 1e-2


if __name__ == "__main__":
    answer(int(sys.argv[3]), sys.argv[1], sys.argv[2])
