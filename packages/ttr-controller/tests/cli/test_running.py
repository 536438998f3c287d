"""Settings of Phase 2 on the command line."""

import inspect

import pytest
from ttr_controller.cli import main, running
from ttr_controller.methods import METHODS
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import QuickstartSettings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "magic"), "ttr: unknown method 'magic'; choose one of auto, pairs"),
        (("--method", "flips"), "has no distillation yet"),
        (("--rollouts", "-3"), "Invalid value for '--rollouts'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(tmp_path, capsys, words, said):
    RunDirectory.open_or_create(tmp_path / "run", QuickstartSettings(rows=8, columns=8, steps=2))
    with pytest.raises(SystemExit) as ended:
        main(["train-controller", str(tmp_path / "run"), *words])
    assert ended.value.code != 0
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error


def test_the_default_is_the_method_that_did_best():
    default = inspect.signature(running.train_controller).parameters["method"].default
    assert default == METHODS[0] == "pairs"
