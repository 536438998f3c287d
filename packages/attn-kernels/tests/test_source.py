"""Rules that hold for the source as a whole: the forward never waits for the device, the import is light."""

import ast
import subprocess
import sys
from pathlib import Path

import attn_kernels
import pytest
import torch
from attn_kernels import (
    Partial,
    TokenGrid,
    merge_partials,
    softmax_attention,
)

SOURCE = Path(attn_kernels.__file__).parent
MEASURES = {"fidelity.py", "testing.py"}
PLANS_ON_CPU = {Path("landmark/selection.py")}
FORWARD = [
    path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name not in MEASURES and path.relative_to(SOURCE) not in PLANS_ON_CPU
]
SYNCS = {
    "item",
    "tolist",
    "any",
    "all",
    "nonzero",
    "argwhere",
    "cpu",
    "numpy",
    "masked_select",
    "unique",
    "synchronize",
}


def test_the_list_of_forward_modules_is_not_empty():
    names = {str(path.relative_to(SOURCE)) for path in FORWARD}
    assert {"near_far/blocked.py", "near_far/reference.py", "near_far/selection.py", "partial.py"} <= names


@pytest.mark.parametrize("path", FORWARD, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_call_in_the_forward_waits_for_the_device(path):
    tree = ast.parse(path.read_text())
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [f"{f.attr} in line {f.lineno}" for f in called if isinstance(f, ast.Attribute) and f.attr in SYNCS]
    assert not [f"bool in line {f.lineno}" for f in called if isinstance(f, ast.Name) and f.id == "bool"]


GRIDS = (TokenGrid(3, 5, 7), TokenGrid(40, 4, 4))


@pytest.mark.parametrize("masked", [False, True])
def test_an_operator_runs_where_no_value_can_be_read(operator, form, masked):
    # Tensors on the meta device have no values, so reading one raises.
    q, k, v = (torch.empty(2, 3, 60, 8, device="meta") for _ in range(3))
    mask = torch.empty(2, 60, dtype=torch.bool, device="meta") if masked else None
    part = operator.bind(q, k, v, GRIDS, mask)(form)
    assert part.out.shape == (2, 3, 60, 8)
    assert part.lse.shape == (2, 3, 60)


def test_partials_join_where_no_value_can_be_read():
    q, k, v = (torch.empty(2, 3, 60, 8, device="meta") for _ in range(3))
    part = softmax_attention(q, k, v, key_mask=torch.empty(2, 60, dtype=torch.bool, device="meta"))
    assert isinstance(merge_partials(part, part), Partial)


def test_every_operator_is_in_the_list_of_operators(operators):
    public = {name for name in attn_kernels.__all__ if name.endswith(("_attention", "_attention_2d", "_regression"))}
    measures = {"softmax_attention", "sampled_attention", "probed_attention"}
    assert public - measures == {operator.function for operator in operators}


def test_every_operator_keeps_quiet_about_a_form_it_lacks(operators):
    q, k, v = (torch.ones(1, 1, 60, 8) for _ in range(3))
    for operator in operators:
        for missing in {"reference", "blocked", "fused"} - set(operator.impls):
            with pytest.raises(ValueError, match="has no impl"):
                operator.bind(q, k, v, GRIDS, None)(missing)


def test_importing_needs_no_triton():
    # A module that is None cannot be imported; torch itself may try and take no for an answer.
    code = (
        "import sys, torch; sys.modules['triton'] = None; import attn_kernels, attn_kernels.cost, attn_kernels.testing"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists_and_is_documented():
    for name in attn_kernels.__all__:
        assert getattr(attn_kernels, name).__doc__
    assert attn_kernels.__all__ == sorted(attn_kernels.__all__)


def test_the_example_of_the_readme_runs(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], {})
    assert "keys per query instead of 1036" in capsys.readouterr().out
