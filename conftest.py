"""What every test run needs, whoever starts it and whatever the clone's folder is called."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
# Their __init__.py is a door for ComfyUI, and their names need not be Python names.
DOORS = (ROOT, ROOT / "packages" / "comfy-nodes")

# Before torch is imported. The tensors of tests are small: a second thread saves nothing, and where another process
# wants the cores, every operation waits for it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


class Doors:
    """Looks for tests below the doors of ComfyUI without importing these as packages."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Treat a door as the plain folder that it is to pytest."""
        return pytest.Dir.from_parent(parent, path=path) if path in DOORS else None


def pytest_configure(config: pytest.Config) -> None:
    """Register as a plugin: a conftest's own hooks are not asked about its folder."""
    config.pluginmanager.register(Doors())
