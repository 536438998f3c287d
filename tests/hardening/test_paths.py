"""Names that lead elsewhere: in prompts, in checkpoints, in a run's results."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from ttr_controller.report.pictures import embed
from ttr_controller.report.results import ResultsError
from ttr_distill import CheckpointError, load_checkpoint, save_checkpoint
from ttr_distill.tiny import TinySampler, load_teacher

from .conftest import files_below

LEADING_OUT = ("../evil", "../../evil", "..\\evil", "/evil", "a/../../evil", "~/evil", "C:\\evil", "..")


def repoint(folder: Path, change: dict[str, object]) -> None:
    """Change a checkpoint's manifest and make its sums right again, as a forger would."""
    save = next(folder.glob("save-*"))
    manifest = json.loads((save / "manifest.json").read_text())
    manifest["files"] |= change
    text = json.dumps(manifest)
    (save / "manifest.json").write_text(text)
    (folder / "LATEST").write_text(f"{save.name} {hashlib.sha256(text.encode()).hexdigest()}\n")


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_pointer_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", {"weight": torch.ones(3)}, {})
    (tmp_path / "evil").mkdir()
    save_checkpoint(tmp_path / "mine", {"weight": torch.zeros(3)}, {})
    digest = (tmp_path / "mine" / "LATEST").read_text().split(" ")[1]
    (tmp_path / "mine" / "LATEST").write_text(f"{name} {digest}")
    with pytest.raises(CheckpointError, match=r"malformed|damaged"):
        load_checkpoint(tmp_path / "mine")


def test_a_forged_manifest_reads_no_file_from_elsewhere(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mine", {"weight": torch.zeros(3)}, {})
    other = save_checkpoint(tmp_path / "other", {"elsewhere": torch.ones(3)}, {}) / "model.safetensors"
    entry = {"sha256": hashlib.sha256(other.read_bytes()).hexdigest(), "bytes": other.stat().st_size}
    repoint(tmp_path / "mine", {f"../../other/{other.parent.name}/model.safetensors": entry})
    with pytest.raises(CheckpointError, match="outside of it"):
        load_checkpoint(tmp_path / "mine")


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_tensor_s_name_makes_no_path(name: str, tmp_path: Path) -> None:
    """Part of a tensor's name becomes the name of a file."""
    try:
        save_checkpoint(tmp_path / "c", {f"{name}/weight": torch.ones(2), f"{name}": torch.ones(1)}, {})
    except (ValueError, OSError):
        pass
    else:
        assert set(load_checkpoint(tmp_path / "c").tensors) == {f"{name}/weight", name}
    assert all(path.is_relative_to(tmp_path / "c") for path in files_below(tmp_path))
    assert not Path("/evil").exists()
    assert not Path("/evil.safetensors").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../secret.png"])
def test_a_report_embeds_no_file_from_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    (tmp_path / "run").mkdir()
    with pytest.raises(ResultsError, match="outside"):
        embed(tmp_path / "run", name, "a fox")


def test_a_link_in_a_run_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fox.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ResultsError, match="outside"):
        embed(tmp_path / "run", "fox.png", "a fox")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "fox/../../x", "fox\0", "'; rm -rf /", "<script>"])
def test_a_prompt_is_words_and_no_path(prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sampler = TinySampler(load_teacher(), rows=2, columns=2, steps=1)
    with pytest.raises(ValueError, match="word"):
        sampler.sample([prompt], [0])
    assert files_below(tmp_path) == []
