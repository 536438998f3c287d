from collections.abc import Callable

import pytest
import torch
from attn_dispatch.native import Dispatcher
from attn_dispatch.native.explain import explain

MakeDispatcher = Callable[..., Dispatcher]


def test_the_table_says_who_runs_and_why_the_rest_does_not(on: MakeDispatcher, packages) -> None:
    del packages.modules["sageattn3"]
    packages.broken["sageattention"] = OSError("libcudart.so.12: cannot open shared object file")
    packages.after["comfy_kitchen"] = lambda output: output * 0
    table = explain(on("blackwell").select("auto"), (1, 24, 4608, 128), torch.bfloat16)
    assert table.chosen.candidate == "flash4"
    assert table["sage3"].reason == "package sageattn3 is not installed"
    assert table["sage2"].reason == ("cannot be imported: OSError: libcudart.so.12: cannot open shared object file")
    assert (table["ck_int8"].reason or "").startswith("gave wrong numbers in a probe: relative error 1,")
    assert table["flash3"].reason == "does not run on blackwell, compute capability 12.0"
    assert table["flash2"].available
    assert not table["flash2"].runs
    assert table["flash"].candidate == "flash2"
    assert [row.candidate for row in table.rows if row.runs] == ["flash4"]
    assert table["sdpa"].available


def test_the_table_can_be_read(on: MakeDispatcher, packages) -> None:
    packages.only("sageattention", "torch")
    text = str(explain(on("ada").select("sage2"), (1, 8, 500, 64)))
    lines = text.splitlines()
    assert lines[0] == (
        "'sage2' on cpu (ampere, compute capability 8.9), for q (1, 8, 500, 64) of bfloat16: SageAttention 2 (INT8)"
    )
    row = next(line for line in lines if line.startswith("->"))
    assert row.split() == ["->", "sage2", "sage2", "SageAttention", "2", "(INT8)", "yes"]
    assert "package xformers is not installed" in text
    assert next(line for line in lines if "PyTorch SDPA (math)" in line).endswith("'sage2' does not ask for it")
    columns = {line.index("SageAttention") for line in lines[2:] if "SageAttention" in line}
    assert len(columns) == 1


@pytest.mark.parametrize(
    ("kwargs", "runs", "call"),
    [
        ({"masked": True}, "ck_int8", "q (2, 8, 4096, 64) of bfloat16 with a mask"),
        ({"keys": 77}, "sage2", "q (2, 8, 4096, 64) and 77 keys of bfloat16"),
        ({"dtype": torch.float32}, "ck_int8", "q (2, 8, 4096, 64) of float32"),
        ({"dtype": torch.float64}, "sdpa", "q (2, 8, 4096, 64) of float64"),
    ],
    ids=str,
)
def test_the_answer_is_that_of_the_call_asked_about(
    on: MakeDispatcher, kwargs: dict[str, object], runs: str, call: str
) -> None:
    table = explain(on("ada").select("auto"), (2, 8, 4096, 64), **kwargs)
    assert table.chosen.candidate == runs
    assert table.call == call


def test_what_is_explained_is_what_runs(on: MakeDispatcher, packages) -> None:
    packages.before["sageattention"] = lambda q: (_ for _ in ()).throw(ValueError("head_dim"))
    selection = on("ada").select("auto")
    q = torch.randn(1, 2, 40, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    table = explain(selection, tuple(q.shape), q.dtype)
    packages.calls.clear()
    selection(q, q, q)
    assert table.chosen.candidate == "ck_int8"
    assert packages.calls == {"comfy_kitchen": 1}


def test_a_failure_in_a_call_shows_in_the_table(on: MakeDispatcher, packages) -> None:
    selection = on("ada").select("sage2")
    q = torch.randn(1, 2, 40, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    selection(q, q, q)

    def fail(q: torch.Tensor) -> None:
        raise RuntimeError("invalid configuration argument")

    packages.before["sageattention"] = fail
    selection(q, q, q)
    table = explain(selection, tuple(q.shape), q.dtype)
    assert table["sage2"].reason == "failed: RuntimeError: invalid configuration argument"
    assert table.chosen.candidate == "sdpa"


def test_a_shape_without_four_sizes_is_an_error(on: MakeDispatcher) -> None:
    with pytest.raises(ValueError, match=r"shape must be \(B, H, Nq, D\), got \(1, 2, 3\)"):
        explain(on("cpu").select("auto"), (1, 2, 3))


def test_an_unknown_row_is_a_key_error(on: MakeDispatcher) -> None:
    with pytest.raises(KeyError):
        explain(on("cpu").select("auto"))["sage9"]
