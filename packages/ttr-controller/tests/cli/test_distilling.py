import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from ttr_controller.cli.app import main
from ttr_controller.cli.distill_options import SessionOptions
from ttr_controller.cli.distilling import open_session, read_prompts, show_students
from ttr_controller.pipeline.settings import RunError
from ttr_distill.checkpoint import CheckpointError
from ttr_distill.distributed import World
from ttr_distill.recorded_calls import Captures
from ttr_distill.saved_students import load_students

pytest.importorskip("diffusers")

TINY = ("--height", "32", "--width", "32", "--steps", "2", "--queries", "16", "--set", "tile=2", "--set", "top_k=1")


def ttr(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "distill.jsonl").read_text().splitlines()]


def test_a_session_on_the_embedded_teacher_writes_table_rows_and_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox on blue\n\navocado\n")
    out = tmp_path / "out"
    command = ("distill", "--prompts", prompts, "--out", out, "--images", 2, *TINY)
    assert ttr(*command) == 0
    shown = capsys.readouterr().out
    for layer in ("double:0", "single:3"):
        assert layer in shown
    assert "0 of 6 layers ready" in shown
    found = load_students(out / "students", fingerprint=None)
    assert found.bank.config.to_dict()["tile"] == 2
    assert {(row["run"], row["layer"]) for row in rows(out)} == {
        (run, str(layer)) for run in (1, 2) for layer in found.bank.layers
    }
    before = rows(out)
    assert ttr(*command) == 0, "a finished session only shows its table"
    assert rows(out) == before
    assert "0 of 6 layers ready" in capsys.readouterr().out


def test_a_recording_is_learned_from(tmp_path: Path) -> None:
    assert ttr("distill", "--out", tmp_path / "out", "--images", 1, "--calibrate", 2, *TINY) == 0
    assert len(Captures(tmp_path / "out" / "captures")) == 12
    assert {row["run"] for row in rows(tmp_path / "out")} == {1, 2}


def test_images_are_measured_where_a_gate_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 26 calls are measured in every layer, more than a student needs to be ready.
    command = ("distill", "--out", tmp_path, "--images", 13, "--train-steps", 0, "--reserve-memory", *TINY)
    for limit in ("1e-9", "10"):
        assert ttr(*command, "--image-gate", limit) == 0, "the second finds a finished session and only measures"
        found = load_students(tmp_path / "students", fingerprint=None)
        close = {layer for layer in found.bank.layers if found.readiness.distance_level(layer) != "unready"}
        assert len(close) > 1
        errors = {found.readiness[layer].image_error for layer in close}
        assert all(error is not None and 1e-9 < error < 1.0 for error in errors)
        served = {layer for layer in found.bank.layers if found.readiness.level(layer) != "unready"}
        assert served == (close if limit == "10" else set())
        shown = capsys.readouterr().out
        assert ("0 of 6 layers ready" in shown) == (limit == "1e-9")
    assert len(rows(tmp_path)) == 13 * 6


def test_what_a_user_can_mend_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "list.json").write_text('{"a": 1}')
    for words, message in (
        (("--prompts", tmp_path / "none.txt"), "No such file"),
        (("--prompts", tmp_path / "list.json"), "must hold a list of strings"),
        (("--images", 1, "--student", "nonsense"), "student must be one of"),
        (("--images", 1, "--set", "bogus=1"), "give name=value with a setting of 'near_far'"),
        (("--images", 1, "--set", "tile"), "give name=value"),
        (("--images", 1, "--set", "tile=-3"), "tile"),
        (("--images", 1, "--height", 30), "multiples of 4 pixels, got 30 x 128"),
        (("--images", 1, "--offload", "model"), "are for a real model"),
        (("--images", 1, "--budget", 1), "--budget is for the quickstart's own run"),
        (("--images", 1, "--learning-rate", -1), "learning_rate must be positive"),
        (("--calibrate", 1, "--sharing", "images"), "layer by layer"),
        (("--image-gate", 0), "the limit of an image gate must be positive"),
        (("--model", tmp_path / "none"), "there is no model at"),
        (("--student", "nonsense"), "unknown preset 'nonsense'"),
    ):
        assert ttr("distill", "--out", out, *words) == 1, words
        said = capsys.readouterr().err
        assert message in said, words
        assert len(said.strip().splitlines()) == 1, said
    assert not out.exists()


def test_prompts_are_lines_or_a_list(tmp_path: Path) -> None:
    text, table = tmp_path / "a.txt", tmp_path / "b.json"
    text.write_text("a fox\n\n  a cat \n")
    table.write_text('["a fox", "a cat"]')
    assert read_prompts(text) == read_prompts(table) == ("a fox", "a cat")
    table.write_text("[1, 2]")
    with pytest.raises(RunError, match="must hold a list of strings"):
        read_prompts(table)
    table.write_text("[")
    with pytest.raises(RunError, match="is no file of prompts"):
        read_prompts(table)
    text.write_text("\n")
    with pytest.raises(RunError, match="holds no prompt"):
        read_prompts(text)


class LoadedPipeline:
    """What a loaded pipeline looks like from outside: the embedded teacher's transformer, prompts ignored."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.device = ""

    def to(self, device: torch.device) -> None:
        self.device = str(device)

    def __call__(
        self, prompt: list[str], num_inference_steps: int, generator: list[torch.Generator], **others: Any
    ) -> SimpleNamespace:
        latents = torch.randn(len(prompt), 16, 16, generator=generator[0])
        callback: Callable[..., dict[str, Tensor]] = others["callback_on_step_end"]
        ids = torch.zeros(16, 3)
        ids[:, 1], ids[:, 2] = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
        with torch.no_grad():
            for step in range(num_inference_steps):
                velocity = self.transformer(
                    hidden_states=latents,
                    encoder_hidden_states=torch.zeros(len(prompt), 12, 64),
                    pooled_projections=torch.zeros(len(prompt), 64),
                    timestep=torch.full((len(prompt),), 1 - step / num_inference_steps),
                    img_ids=ids,
                    txt_ids=torch.zeros(12, 3),
                    return_dict=False,
                )[0]
                latents = callback(self, step, None, {"latents": latents - velocity / num_inference_steps})["latents"]
        assert (others["height"], others["width"], others["guidance_scale"]) == (256, 1024, 2.0)
        return SimpleNamespace(images=latents)


def test_a_real_model_goes_through_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttr_distill.tiny import load_teacher

    loaded: list[tuple[str, torch.dtype]] = []

    def load(model: str, *, dtype: torch.dtype) -> LoadedPipeline:
        loaded.append((model, dtype))
        return LoadedPipeline(load_teacher().transformer)

    monkeypatch.setattr("ttr_distill.adapters.diffusers_pipeline.load_pipeline", load)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["a fox"]')
    options = SessionOptions(
        "someone/model", prompts, images=2, steps=3, height=256, guidance=2.0, dtype="float32", settings=("tile=2",)
    )
    session = open_session(options, tmp_path / "out", "near_far", World(), 7)
    session.run()
    assert loaded == [("someone/model", torch.float32)]
    assert [row["updates"] for row in rows(tmp_path / "out")] == [3] * 6 + [6] * 6
    console = Console(record=True, width=100)
    show_students(session.students, console)
    assert "single:3" in console.export_text()
    with pytest.raises(RunError, match="say with --prompts FILE what someone/model shall draw"):
        open_session(SessionOptions("someone/model"), tmp_path / "other", "near_far", World(), 7)
    changed = SessionOptions("someone/model", prompts, steps=4, height=256, guidance=2.0, dtype="float32")
    with pytest.raises(CheckpointError, match="steps: 4 here, 3 there"):
        open_session(changed, tmp_path / "out", "near_far", World(), 7)
