"""scripts/check_dependencies.py holds here, and finds what is wrong elsewhere."""

import pytest
from check_dependencies import (
    PERMISSIVE,
    REASONS,
    closure,
    default_dependencies,
    licence_fault,
    licence_of,
    main,
    projects,
    reason_faults,
)


def test_every_default_dependency_has_a_reason_and_a_licence(capsys: pytest.CaptureFixture[str]) -> None:
    status = main()
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    assert "| torch |" in captured.out


def test_value_utils_brings_nothing() -> None:
    tables = projects()
    assert default_dependencies({"value-utils": tables["value-utils"]}) == {}
    assert set(default_dependencies({"attn-kernels": tables["attn-kernels"]})) <= {
        "numpy", "torch", "triton", "triton-windows"
    }  # fmt: skip


def test_a_dependency_without_a_reason_and_the_reverse() -> None:
    found = default_dependencies({"a": {"dependencies": ["torch>=2", "Left_Pad", "b>=1"]}, "b": {}})
    assert found == {"left-pad": ["a"], "torch": ["a"]}
    assert reason_faults(found, {"torch": "tensors", "jinja2": "pages"}) == [
        "left-pad, required by a, has no reason",
        "jinja2 has a reason and nobody requires it",
    ]


@pytest.mark.parametrize(
    ("licence", "good"),
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-3-Clause", True),
        ("BSD License", True),
        ("MPL-2.0", True),
        ("GPL-3.0-only", False),
        ("GNU Affero General Public License v3", False),
        ("MIT OR GPL-2.0", True),
        ("GNU Lesser General Public License", False),
        ("", False),
        ("All rights reserved, commits welcome", False),
    ],
)
def test_licences(licence: str, good: bool) -> None:
    assert (licence_fault("some-package", licence) is None) is good


def test_the_closure_follows_what_is_required_without_extras() -> None:
    brought = closure(["torch"])
    assert {"torch", "sympy", "filelock"} <= set(brought)
    assert "optree" not in brought, "an extra of torch"
    assert licence_of("torch")
    assert REASONS
    assert PERMISSIVE
