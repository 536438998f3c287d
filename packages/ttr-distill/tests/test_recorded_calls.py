import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, TokenLayout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ttr_distill.checkpoint import CheckpointError
from ttr_distill.grad import training_mode
from ttr_distill.recorded_calls import MANIFEST, Captures, CaptureWriter
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.replay import ReplaySample

CallMaker = Callable[..., AttentionCall]
LAYERS = tuple(LayerKey("single", index) for index in range(2))
FACTS = {"fingerprint": "abc", "student": {"preset": "near_far"}}


def samples_of(make_call: CallMaker, run: int) -> list[ReplaySample]:
    found = []
    for layer in LAYERS:
        call = make_call(run, layer=layer)
        layout = call.layout
        assert isinstance(layout, TokenLayout)
        with training_mode():
            sample = capture(
                call, call.v, layer, layout, None, CaptureConfig(10, 4), seed=0, generator=torch.Generator()
            )
        assert sample is not None
        found.append(replace(sample, trainable=run % 3 != 2))
    return found


def record(folder: Path, make_call: CallMaker, runs: range, *, shard_bytes: int = 1, flush: bool = True) -> None:
    writer = CaptureWriter(folder, FACTS, shard_bytes=shard_bytes)
    assert writer.runs == runs.start
    for run in runs:
        for sample in samples_of(make_call, run):
            writer.take(sample)
        writer.end_run()
    if flush:
        writer.flush()


def test_what_was_recorded_is_read_back_from_the_files(tmp_path: Path, make_call: CallMaker) -> None:
    record(tmp_path, make_call, range(4), shard_bytes=50_000)
    captures = Captures(tmp_path, fingerprint="abc")
    assert (captures.layers, captures.runs, len(captures)) == (LAYERS, 4, 8)
    assert captures.facts == FACTS
    assert 1 < len(list(tmp_path.glob("shard-*"))) < 4, "runs share shards"
    for index, layer in enumerate(LAYERS):
        assert (list(captures.trainable(layer)), list(captures.heldout(layer))) == ([0, 1, 3], [2])
        for run in range(4):
            expected, found = samples_of(make_call, run)[index], captures.load(layer, run)
            assert found.facts() == expected.facts()
            for name, tensor in expected.tensors().items():
                assert torch.equal(found.tensors()[name], tensor), name


def test_a_recording_goes_on_after_the_last_run_on_disk(tmp_path: Path, make_call: CallMaker) -> None:
    record(tmp_path, make_call, range(2))
    record(tmp_path, make_call, range(2, 4), shard_bytes=10**9, flush=False)  # killed before its shard was written
    writer = CaptureWriter(tmp_path, FACTS)
    assert writer.runs == 2
    writer.take(samples_of(make_call, 2)[0])
    writer.drop_run()
    writer.end_run()
    writer.flush()
    assert (Captures(tmp_path).runs, len(Captures(tmp_path))) == (3, 4)


def test_a_shard_that_the_manifest_does_not_name_does_not_count(tmp_path: Path, make_call: CallMaker) -> None:
    record(tmp_path, make_call, range(1))
    before = (tmp_path / MANIFEST).read_bytes()
    record(tmp_path, make_call, range(1, 2))
    (tmp_path / MANIFEST).write_bytes(before)  # killed between shard and manifest
    assert len(Captures(tmp_path)) == 2
    record(tmp_path, make_call, range(1, 3))
    assert len(Captures(tmp_path)) == 6
    assert Captures(tmp_path).load(LAYERS[1], 2).k.shape[2] == 106


def test_other_models_and_settings_are_refused(tmp_path: Path, make_call: CallMaker) -> None:
    record(tmp_path, make_call, range(1))
    with pytest.raises(CheckpointError, match="made with abc, the model here is xyz"):
        Captures(tmp_path, fingerprint="xyz")
    with pytest.raises(CheckpointError, match="has fingerprint abc, not other; choose another folder"):
        CaptureWriter(tmp_path, FACTS | {"fingerprint": "other"})
    with pytest.raises(CheckpointError, match="there is no recording at"):
        Captures(tmp_path / "none")
    with pytest.raises(ValueError, match="shard_bytes must be positive"):
        CaptureWriter(tmp_path, FACTS, shard_bytes=0)


def test_a_newer_schema_is_named(tmp_path: Path, make_call: CallMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("ttr_distill.recorded_calls.SCHEMA", 9)
        record(tmp_path, make_call, range(1))
    with pytest.raises(CheckpointError, match="has schema 9, this version reads 1"):
        Captures(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans(), manifest=st.booleans())
def test_every_flipped_bit_and_every_cut_is_refused_in_one_sentence(
    tmp_path: Path, make_call: CallMaker, place: float, bit: int, cut: bool, manifest: bool
) -> None:
    if not (tmp_path / MANIFEST).exists():
        record(tmp_path, make_call, range(1), shard_bytes=10**9)
    file = tmp_path / (MANIFEST if manifest else "shard-000001.safetensors")
    whole = file.read_bytes()
    at = int(place * len(whole))
    damaged = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
    file.write_bytes(damaged)
    try:
        with pytest.raises(CheckpointError) as caught:
            Captures(tmp_path).load(LAYERS[0], 0)
        assert "\n" not in str(caught.value)
    finally:
        file.write_bytes(whole)
    assert json.loads((tmp_path / MANIFEST).read_text().partition("\n")[2])["runs"] == 1
