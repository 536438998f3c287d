import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from ttr_distill.checkpoint import CheckpointError
from ttr_distill.legacy.payload import moments_by_name, number, read_payload, section, tensors_of, write_payload


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


def one_line(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        read_payload(path, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_in_one_sentence(tmp_path: Path, zipped: bool) -> None:
    proof, file = tmp_path / "proof", tmp_path / "evil.pt"
    payload = {"format": "x", "layers": Malicious(proof)}
    torch.save(payload, file, _use_new_zipfile_serialization=zipped)
    one_line(file, "loading it could run code; refused")
    assert not proof.exists()
    torch.load(file, weights_only=False)
    assert proof.exists(), "the file is harmless; the test shows nothing"


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"format": "x", "layers": Malicious(tmp_path / "proof")}))
    one_line(tmp_path / "evil.pt", "evil.pt")
    assert not (tmp_path / "proof").exists()


def test_a_round_trip_keeps_values_and_the_old_file_survives_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_payload(tmp_path / "new" / "a.pt", {"format": "x", "tensor": torch.arange(3), "number": 0.5})
    found = read_payload(file, "x")
    assert torch.equal(found["tensor"], torch.arange(3))
    assert found["number"] == 0.5

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_payload(file, {"format": "x", "number": 1.0})
    assert read_payload(file, "x")["number"] == 0.5
    assert list(file.parent.iterdir()) == [file]


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    one_line(tmp_path / "nowhere.pt", "there is no checkpoint file")
    one_line(tmp_path, "there is no checkpoint file")
    for content in (b"", b"hello", b"PK\x03\x04 not really"):
        (tmp_path / "a.pt").write_bytes(content)
        one_line(tmp_path / "a.pt", "a.pt")
    for payload in ({"format": "y"}, [1, 2], {}):
        torch.save(payload, tmp_path / "b.pt")
        one_line(tmp_path / "b.pt", "unsupported checkpoint format")


def test_damaged_tensors_are_noticed(tmp_path: Path) -> None:
    """Truncations anywhere, and flipped bits in the tensors, which carry checksums."""
    file = tmp_path / "a.pt"
    write_payload(file, {"format": "x", "tensor": torch.randn(4000)})
    whole, draw = file.read_bytes(), random.Random(3)
    middle = whole.index(torch.load(file)["tensor"].numpy().tobytes())
    for case in range(100):
        damaged = bytearray(whole)
        if case % 2:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            damaged[middle + draw.randrange(16000)] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        one_line(file, "a.pt")


def test_values_are_read_tolerantly_and_mappings_are_not() -> None:
    assert [number(value, 7.0) for value in (1, 0.5, float("nan"), "1", None, True)] == [1.0, 0.5, 7.0, 7.0, 7.0, 7.0]
    assert section({"a": {"b": 1}}, "a") == {"b": 1}
    assert section({}, "a") == {}
    for wrong in (3, {1: 2}):
        with pytest.raises(ValueError, match="no mapping by name"):
            section({"a": wrong}, "a")
    with pytest.raises(ValueError, match="no state dict"):
        tensors_of({"a": 1}, "it")


def test_moments_are_found_by_name() -> None:
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 4)]
    optimizer = torch.optim.AdamW([{"params": parameters[1:]}, {"params": parameters[:1]}])
    (parameters[0].sum() + parameters[2].sum()).backward()
    optimizer.step()
    found = dict(moments_by_name(optimizer.state_dict(), ["three", "four", "two"]))
    assert {name: entry["exp_avg"].numel() for name, entry in found.items()} == {"four": 4, "two": 2}
    with pytest.raises(ValueError, match="3 parameters, the model has 1"):
        list(moments_by_name(optimizer.state_dict(), ["one"]))
    with pytest.raises(ValueError, match="no groups"):
        list(moments_by_name({}, []))
