"""Every kernel, compiled for every GPU it is shipped for: needs neither the GPU nor its driver.

The kernels and what is asserted about them: see ``aot.py``. The first case of each kernel is compiled for all targets
and the further ones for one each; ``COMPILE_EVERY_TARGET=1`` compiles all of them for all, as ``nox -s kernels`` does.
``TRITON_CACHE_DIR`` names a folder in which a later run finds what an earlier one compiled.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        platform.system() != "Linux" or importlib.util.find_spec("triton") is None,
        reason="Triton's wheel with compilers for all targets exists for Linux only",
    ),
]
TESTS = Path(__file__).parent
TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")
FOLDERS = tuple(path.parent.name for path in sorted(TESTS.glob("*/compile_cases.py")))


def load_aot() -> ModuleType:
    """Import the module beside this one, which pytest's import mode does not put on the path."""
    spec = importlib.util.spec_from_file_location("attn_kernels_aot", TESTS / "aot.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AOT = load_aot()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("TRITON_CACHE_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def examples(cache: Path) -> dict[tuple[str, str], list[str]]:
    found = AOT.compile_files([TESTS / "aot_examples.py"], cache)
    assert all(report.error or report.instructions for report in found)
    return {(report.case, report.target): report.faults() for report in found}


@pytest.fixture(scope="module")
def shipped(cache: Path) -> Sequence:
    return AOT.compile_files(AOT.find(), cache, every=os.environ.get("COMPILE_EVERY_TARGET") == "1")


def test_a_sound_kernel_has_no_fault_on_any_target(examples):
    assert [fault for target in TARGETS for fault in examples["sound", target]] == []
    assert examples["group", "sm90"] == examples["group", "sm120"] == []
    assert examples["copy", "sm90"] == examples["copy", "gfx942"] == []


@pytest.mark.parametrize(
    ("case", "target", "fault"),
    [
        ("no product", "sm80", "has no HMMA"),
        ("no product", "gfx942", "has no v_mfma"),
        ("narrow", "sm90", "has no HGMMA"),
        ("spills", "sm80", "spills"),
        ("spills", "gfx942", "spills"),
        ("too much shared", "sm90", "bytes of shared memory"),
        ("too much shared", "gfx942", "bytes of shared memory"),
        ("tensor memory", "sm100", "holds a trap"),
        ("misshapen", "sm90", "does not compile"),
        ("unknown name", "sm90", "parameters that the kernel lacks: ['stride']"),
        ("no value", "sm90", "the constexpr parameter K no value"),
    ],
)
def test_a_fault_is_reported(examples, case, target, fault):
    assert any(fault in text for text in examples[case, target]), examples[case, target]


def test_a_short_run_has_every_kernel_on_every_target_and_every_case_on_one():
    cases = {name: {"kernel": name[0], "targets": None} for name in ("a1", "a2", "a3", "b1", "b2")}
    cases["c1"] = {"kernel": "c", "targets": ["sm90"]}
    found = AOT.choose_targets(cases, TARGETS, every=False)
    assert found["a1"] == found["b1"] == list(TARGETS)
    assert [found[name] for name in ("a2", "a3", "b2")] == [["sm86"], ["sm89"], ["sm100"]]
    assert found["c1"] == ["sm90"]
    assert AOT.choose_targets(cases, TARGETS, every=True)["a2"] == list(TARGETS)


def test_a_file_that_cannot_be_loaded_is_reported(tmp_path, cache):
    broken = tmp_path / "compile_cases.py"
    broken.write_text("import a_module_that_is_not_there\n")
    (report,) = AOT.compile_files([broken], cache)
    assert "a_module_that_is_not_there" in report.faults()[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_kernels_of_an_operator_are_sound(shipped, folder, target):
    reports = [one for one in shipped if Path(one.file).parent.name == folder]
    assert reports, "cases() is empty"
    # A file that cannot be loaded has no target.
    assert [fault for one in reports if one.target in ("", target) for fault in one.faults()] == []


def test_every_fused_module_has_kernels_that_are_compiled():
    import attn_kernels

    source = Path(attn_kernels.__file__).parent
    assert {path.parent.name for path in source.glob("*/fused*.py")} <= set(FOLDERS)
