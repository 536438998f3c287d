"""The process of ``aot.py`` that compiles: one request per line of its input, one answer per line of its output.

It runs without ``TRITON_INTERPRET`` and catches nothing: a kernel that does not compile ends it, and its last words
are the report.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@functools.lru_cache(maxsize=64)
def load_cases(file: str) -> dict[str, dict[str, Any]]:
    """Load the cases of a file by name.

    Raises:
        ValueError: Two cases have the same name.
    """
    spec = importlib.util.spec_from_file_location(f"compile_cases_{Path(file).parent.name}", file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = list(module.cases())
    found = {case["name"]: case for case in cases}
    if len(found) != len(cases):
        raise ValueError(f"{file}: two cases have the same name")
    return found


def launch_signature(
    case: Mapping[str, Any], constants: Mapping[str, object]
) -> tuple[dict[str, str], dict[tuple[int], object], dict[tuple[int], list[list[object]]]]:
    """Types, constants and alignment of the kernel's parameters, as Triton's compiler wants them.

    Raises:
        ValueError: A parameter is named that the kernel lacks, or a constexpr parameter has no value.
    """
    kernel, pointers = case["kernel"], case["pointers"]
    numbers = {**case.get("ints", {}), **case.get("floats", {})}
    divisible = tuple(case.get("divisible", ()))
    unknown = {*pointers, *constants, *numbers, *divisible} - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"case {case['name']!r} names parameters that the kernel lacks: {sorted(unknown)}")
    types: dict[str, str] = {}
    values: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants or (parameter.is_constexpr and parameter.has_default):
            types[name] = "constexpr"
            values[(position,)] = constants.get(name, parameter.default)
            continue
        if parameter.is_constexpr:
            raise ValueError(f"case {case['name']!r} gives the constexpr parameter {name} no value")
        types[name] = pointers[name] if name in pointers else numbers.get(name, "i32")
        if name in pointers or name in divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, values, attributes


def compile_case(file: str, name: str, target: str, machine: tuple[str, int | str, int]) -> dict[str, Any]:
    """Compile one kernel for one target and read its machine code.

    Args:
        file: A ``compile_cases.py``.
        name: A case of it.
        target: Where the case looks up its options.
        machine: Backend, architecture and threads per warp.

    Returns:
        Fields of ``aot.Report``.
    """
    case = load_cases(file)[name]
    table = case.get("options", {})
    options = {"num_warps": 4, **table.get(target, table.get("default", {}))}
    constants = {**case["constants"], **options.pop("constants", {})}
    types, values, attributes = launch_signature(case, constants)
    source = ASTSource(fn=case["kernel"], signature=types, constexprs=values, attrs=attributes)
    # Its default changes between versions of Triton.
    options.setdefault("enable_fp_fusion", True)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget(*machine), options=options)
    seconds = time.perf_counter() - start
    code = compiled.asm
    return {
        "mma": case.get("mma", True),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "seconds": round(seconds, 2),
        **(read_amd(code["amdgcn"]) if "amdgcn" in code else read_nvidia(code["cubin"], code["ptx"])),
    }


def read_nvidia(binary: bytes, ptx: str) -> dict[str, Any]:
    """Count in the machine code of an NVIDIA kernel, with the disassembler of Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary)
        code, usage = (
            subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    registers = re.search(r"REG:(\d+)", usage)
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    if registers is None or not names:
        raise RuntimeError(f"cuobjdump says nothing that can be read: {usage[:200]!r}")
    return {
        "registers": int(registers[1]),
        "spills": names.count("LDL") + names.count("STL"),
        "matrix": {name: names.count(name) for name in sorted(set(names)) if name.endswith("MMA")},
        "instructions": len(names),
        "trap": re.search(r"^\s*trap;", ptx, re.MULTILINE) is not None,
    }


def read_amd(code: str) -> dict[str, Any]:
    """Count in the assembly of an AMD kernel."""

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the assembly has no .{field}")
        return int(found[1])

    matrix = re.findall(r"^\s+(v_mfma|v_wmma|v_smfmac)_", code, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "matrix": {name: matrix.count(name) for name in sorted(set(matrix))},
        "instructions": len(re.findall(r"^\s+(?:v|s|ds|buffer|global|flat|scratch)_\w+", code, re.MULTILINE)),
        "trap": re.search(r"^\s+s_trap\b", code, re.MULTILINE) is not None,
    }


def main() -> None:
    """Answer requests until there are no more."""
    # Whatever a compiler prints goes to the log; the answers have the stream to themselves.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            if "target" in request:
                answer = compile_case(request["file"], request["case"], request["target"], request["machine"])
            else:
                answer = {
                    name: {"kernel": case["kernel"].__name__, "targets": case.get("targets")}
                    for name, case in load_cases(request["file"]).items()
                }
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
