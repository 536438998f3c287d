"""Keys and tokens in the environment reach no file that a run writes, and nothing that it prints."""

import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from .conftest import files_below

SECRETS = MappingProxyType(
    {
        name: f"fake-{number}-9f8e7d6c5b4a"
        for number, name in enumerate(
            (
                "COMET_API_KEY",
                "HF_TOKEN",
                "HUGGING_FACE_HUB_TOKEN",
                "WANDB_API_KEY",
                "TRACKIO_WRITE_TOKEN",
                "OPENAI_API_KEY",
                "AWS_SECRET_ACCESS_KEY",
            )
        )
    }
)

EVERYTHING = """
import sys
from pathlib import Path
from attn_dispatch import AttentionRouter, FidelityProbe, Route
from attn_dispatch.backends import HybridBackend, HybridBackendConfig, TaylorBackend, TaylorBackendConfig
from ttr_controller.cli import main
from ttr_controller.pipeline.quickstart import PHASES, run_phases
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import QuickstartSettings
from ttr_distill.tiny import TinySampler, load_teacher

run = RunDirectory.open_or_create(
    Path("run"), QuickstartSettings(budget_minutes=0.1, rows=8, columns=8, steps=2, timing_sides=(8, 12)))
run_phases(run, tuple(PHASES))
sampler = TinySampler(load_teacher(), rows=8, columns=8, steps=1)
backends = TaylorBackend(TaylorBackendConfig(P=3, min_tokens=0)), HybridBackend()
sampler.sample(["fox"], [0], FidelityProbe(AttentionRouter([Route(one) for one in backends])))
for words in (["report", "run"], ["inspect", "run"], ["inspect", "run/students"],
              ["sample", "fox on blue", "--run", "run", "--out", "fox.png"],
              ["sample", "a word nobody drew", "--run", "run"], ["inspect", "nowhere"]):
    try:
        main(words)
    except SystemExit:
        pass
"""


@pytest.mark.slow
def test_no_key_is_written_or_printed(tmp_path: Path) -> None:
    places = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "tmp", "XDG_CACHE_HOME": tmp_path / "cache"}
    for place in (*places.values(), tmp_path / "work"):
        place.mkdir()
    known = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    environment = {**known, **SECRETS, **{name: str(place) for name, place in places.items()}, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr.decode()
    written = {path: path.read_bytes() for path in files_below(tmp_path)}
    names = {path.name for path in written}
    assert {"results.json", "distillation.jsonl", "LATEST", "manifest.json", "report.html", "fox.png"} <= names
    for content in (*written.values(), done.stdout, done.stderr):
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, name
    # Nor the names, which would say where to look.
    assert not any(b"API_KEY" in content or b"HF_TOKEN" in content for content in written.values())
