"""How hard the hardening tests try: briefly within the ordinary tests, at length with HARDENING=long."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

LONG = os.environ.get("HARDENING") == "long"

settings.register_profile(
    "hardening",
    max_examples=2000 if LONG else 200,
    deadline=None,
    # The short form asks the same questions in every run; the long one asks new ones.
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether time is no object."""
    return LONG


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
