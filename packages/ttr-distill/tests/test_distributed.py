import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext
from torch import Tensor, multiprocessing
from ttr_distill.distributed import Team, World, joined, own_layers
from ttr_distill.metrics import MetricValue
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig, Distiller

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYERS = tuple(LayerKey("single", index) for index in range(3))
CONFIG = DistillConfig(capture=CaptureConfig(16, 8), min_swap_layers=2, heldout_period=3)


class Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, MetricValue]] = []

    def write(self, row: Mapping[str, MetricValue]) -> None:
        self.rows.append(dict(row))


def sampled(distiller: Distiller, make_call: CallMaker, native: Native, image: int) -> None:
    with torch.inference_mode():
        distiller.begin_run()
        for step in range(2):
            for layer in LAYERS:
                distiller(make_call(10 * image + step, layer=layer, step=StepContext(1 - step / 2)), native)
        distiller.end_run()


def train(world: World, sharing: str, images: int, make_call: CallMaker, native: Native) -> dict[str, object]:
    """What every process does: three rounds, then its students, readiness, rows and training state."""
    bank = StudentBank.for_layers(preset("near_far", tile=3, top_k=1), LAYERS, 2, 16)
    worker = world.rank if sharing == "images" else 0
    own = own_layers(world, LAYERS, sharing)  # type: ignore[arg-type]
    distiller = Distiller(bank, ReadinessTracker(), CONFIG, seed=4, layers=own, worker=worker)
    rows = Rows()
    team = Team(world, distiller, sharing, sinks=(rows,))  # type: ignore[arg-type]
    mine = range(images) if sharing == "layers" else world.share(range(images))
    for image in mine:
        sampled(distiller, make_call, native, image)
        team.end_round()
    distiller.raise_pending()
    return {
        "weights": dict(bank.state_dict()),
        "readiness": distiller.readiness.state_dict(),
        "rows": rows.rows,
        "state": distiller.state_dict(include_replay=False),
    }


def one_process(rank: int, folder: Path, sharing: str, make_call: CallMaker, native: Native) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    with joined("cpu", environment=environment, init_method=f"file://{folder / 'meet'}") as world:
        torch.save(train(world, sharing, 6, make_call, native), folder / f"{rank}.pt")


def two_processes(folder: Path, sharing: str, make_call: CallMaker, native: Native) -> list[dict[str, object]]:
    multiprocessing.start_processes(one_process, (folder, sharing, make_call, native), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal(left: object, right: object) -> None:
    assert isinstance(left, dict)
    assert isinstance(right, dict)
    assert set(left) == set(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_layers_shared_over_two_processes_give_the_students_of_one(
    tmp_path: Path, make_call: CallMaker, native: Native
) -> None:
    alone = train(World(), "layers", 6, make_call, native)
    first, second = two_processes(tmp_path, "layers", make_call, native)
    for found in (first, second):
        assert_equal(found["weights"], alone["weights"])
        assert found["readiness"] == alone["readiness"]
    for row in (*first["rows"], *alone["rows"]):  # type: ignore[misc]
        row.pop("replay_bytes")
    assert first["rows"] == alone["rows"] != []
    assert second["rows"] == [], "the main process logs"
    # The main process holds what a checkpoint needs of all layers.
    assert_equal(first["state"].tensors, alone["state"].tensors)  # type: ignore[attr-defined]
    assert first["state"].facts == alone["state"].facts  # type: ignore[attr-defined]


def test_images_shared_over_two_processes_train_one_student(
    tmp_path: Path, make_call: CallMaker, native: Native
) -> None:
    first, second = two_processes(tmp_path, "images", make_call, native)
    assert_equal(first["weights"], second["weights"])
    assert first["readiness"] == second["readiness"]
    measured = {name: entry["updates"] for name, entry in first["readiness"].items()}  # type: ignore[attr-defined]
    alone = train(World(), "images", 6, make_call, native)
    single = {name: entry["updates"] for name, entry in alone["readiness"].items()}  # type: ignore[attr-defined]
    assert sum(measured.values()) == pytest.approx(sum(single.values()), abs=4), "readiness hears of all images"
    half = train(World(), "images", 3, make_call, native)
    name = "students.single:0.temperature"
    assert not torch.equal(first["weights"][name], half["weights"][name])  # type: ignore[index]
    assert {row["run"] for row in first["rows"]} == {1, 2, 3}  # type: ignore[attr-defined]
    assert second["rows"] == []


def one_of_a_round(rank: int, folder: Path, make_call: CallMaker, native: Native) -> None:
    environment = {"RANK": str(rank), "WORLD_SIZE": "2"}
    with joined("cpu", environment=environment, init_method=f"file://{folder / 'meet'}") as world:
        bank = StudentBank.for_layers(preset("near_far", tile=3, top_k=1), LAYERS[:1], 2, 16)
        distiller = Distiller(bank, ReadinessTracker(), CONFIG, seed=4, worker=rank)
        team = Team(world, distiller, "images")
        sampled(distiller, make_call, native, rank)
        before = [tensor.clone() for tensor in distiller.layer_training(LAYERS[0]).shared_tensors()]
        team.end_round()
        after = [tensor.clone() for tensor in distiller.layer_training(LAYERS[0]).shared_tensors()]
        torch.save((before, after), folder / f"{rank}.pt")


def test_after_a_round_weights_and_moments_are_the_mean(tmp_path: Path, make_call: CallMaker, native: Native) -> None:
    multiprocessing.start_processes(one_of_a_round, (tmp_path, make_call, native), nprocs=2, start_method="fork")
    (left, joint), (right, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(not torch.equal(a, b) for a, b in zip(left, right, strict=True))
    for a, b, mean, other in zip(left, right, joint, same, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)
        assert torch.equal(mean, other)


def test_alone_nothing_is_initialised() -> None:
    with joined("cpu", environment={}) as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert world.gather("a") == ["a"]
        tensor = torch.ones(2)
        world.mean_([tensor])
        world.broadcast_([tensor])
        world.wait()
        assert tensor.tolist() == [1.0, 1.0]


def test_shares_are_disjoint_and_complete() -> None:
    parts = [World(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(8))
    assert own_layers(World(1, 3), LAYERS) == LAYERS[1:2]
    assert own_layers(World(1, 3), LAYERS, "images") == LAYERS


def test_a_team_is_put_together_right() -> None:
    bank = StudentBank.for_layers(preset("near_far"), LAYERS, 2, 16)
    with pytest.raises(ValueError, match="rank 1 must train"):
        Team(World(1, 2), Distiller(bank, ReadinessTracker()))
    with pytest.raises(ValueError, match="give the sinks to the Team"):
        Team(World(), Distiller(bank, ReadinessTracker(), sinks=(Rows(),)))


SCRIPT = """
import json, sys, torch
from ttr_distill.distributed import joined
with joined("cpu") as world:
    tensor, other = torch.full((3,), float(world.rank)), torch.full((2,), world.rank, dtype=torch.float64)
    world.mean_([tensor, other])
    text = [torch.tensor(float(world.rank))]
    world.broadcast_(text, 1)
    found = world.gather(world.rank * 10)
    world.wait()
    if world.main:
        print(json.dumps([world.size, tensor.tolist(), other.tolist(), text[0].item(), found]))
"""


@pytest.mark.slow
def test_the_same_program_runs_under_torchrun_and_without(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    found = []
    for command in (start, [sys.executable, str(script)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found == [[2, [0.5] * 3, [0.5] * 2, 1.0, [0, 10]], [1, [0.0] * 3, [0.0] * 2, 0.0, [0]]]
