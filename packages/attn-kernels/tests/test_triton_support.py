import sys
from types import ModuleType

import pytest
import torch
from attn_kernels import triton_support
from attn_kernels.triton_support import refuse_fused, triton_version
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def pretend(monkeypatch):
    """Puts another module in Triton's place, or ``None`` for a missing one."""

    def put(module):
        monkeypatch.setitem(sys.modules, "triton", module)
        triton_version.cache_clear()

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield put
    triton_version.cache_clear()


def version(text):
    module = ModuleType("triton")
    module.__version__ = text
    return module


@pytest.fixture
def on_cuda():
    with FakeTensorMode():
        return torch.empty(1, device="cuda")


def test_an_old_compiler_is_refused_where_the_kernel_needs_a_newer_one(pretend, on_cuda):
    pretend(version("3.2.0"))
    assert triton_version() == (3, 2)
    assert refuse_fused("auto", on_cuda) is None
    assert "install 3.3 or newer" in str(refuse_fused("auto", on_cuda, least=(3, 3)))
    pretend(version("3.10.1+git"))
    assert refuse_fused("auto", on_cuda, least=(3, 3)) is None


def test_a_compiler_that_fails_for_some_gpus_is_refused_there_only(pretend, on_cuda, monkeypatch):
    from attn_kernels.kernel_regression.api import _FAILING

    monkeypatch.setattr(triton_support, "device_target", lambda device: "sm100")
    pretend(version("3.5.1"))
    assert refuse_fused("auto", on_cuda) is None
    assert "fails on it for sm100" in str(refuse_fused("auto", on_cuda, failing=_FAILING))
    monkeypatch.setattr(triton_support, "device_target", lambda device: "sm90")
    assert refuse_fused("auto", on_cuda, failing=_FAILING) is None
    monkeypatch.setattr(triton_support, "device_target", lambda device: "sm100")
    for newer in ("3.4.0", "3.6.0", "3.9.0"):
        pretend(version(newer))
        assert refuse_fused("auto", on_cuda, failing=_FAILING) is None


def test_what_cannot_be_imported_is_a_reason_and_no_crash(pretend, on_cuda, monkeypatch):
    pretend(None)
    assert "not installed" in str(refuse_fused("fused", on_cuda))

    def broken(name):
        raise ModuleNotFoundError("No module named 'setuptools'", name="setuptools")

    monkeypatch.setattr(triton_support.importlib, "import_module", broken)
    triton_version.cache_clear()
    assert "setuptools" in str(refuse_fused("fused", on_cuda))

    def torn(name):
        raise OSError("libtriton.so: file too short")

    monkeypatch.setattr(triton_support.importlib, "import_module", torn)
    triton_version.cache_clear()
    assert "file too short" in str(refuse_fused("fused", on_cuda))


def test_cpu_tensors_want_the_interpreter_and_auto_never_takes_it(monkeypatch, on_cuda):
    on_cpu = torch.empty(1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA tensors" in str(refuse_fused("fused", on_cpu))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refuse_fused("fused", on_cpu) is None
    assert refuse_fused("auto", on_cpu) == "the tensors are on the CPU"
    assert "unset it" in str(refuse_fused("fused", on_cuda))
    assert "cpu, cuda" in str(refuse_fused("fused", on_cpu, on_cuda))
