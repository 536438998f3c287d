"""The oracle and the data that the tests of Taylor attention share."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def series():
    """The module ``series.py`` beside this file; test modules cannot import their neighbours."""
    spec = importlib.util.spec_from_file_location("taylor_series", Path(__file__).with_name("series.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
