import subprocess
import sys


def test_standard_library_only() -> None:
    code = "import sys, value_utils; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    foreign = set(loaded) - sys.stdlib_module_names - {"value_utils", "__main__"}
    assert not {name for name in foreign if not name.startswith(("_", "sitecustomize"))}
