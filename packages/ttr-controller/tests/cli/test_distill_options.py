from dataclasses import fields
from inspect import signature

import pytest
from ttr_controller.cli.distill_options import SessionOptions
from ttr_controller.cli.distilling import distill


def test_options_select_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not SessionOptions().any
    assert SessionOptions(calibrate=1).any
    assert SessionOptions(image_gate=0.1).any
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert SessionOptions().any


def test_every_option_of_the_command_reaches_the_session() -> None:
    said = set(signature(distill).parameters)
    assert {field.name for field in fields(SessionOptions)} - {"settings"} <= said
    assert said - {field.name for field in fields(SessionOptions)} == {
        "out", "student", "setting", "device", "budget", "seed", "comet", "trackio",
    }  # fmt: skip
