"""Draw the paper's figures and write its tables and numbers, all from ``benchmarks/results``.

    uv run python scripts/make_figures.py
    uv run python scripts/make_figures.py --check

Writes ``docs/paper/generated``: ``*.pdf`` figures, ``*.tex`` tables, and ``numbers.tex``, which defines a command for
every measured number that the text names. A result that is not there gives no file, and the text says "not measured".
``--check`` writes nothing and ends with 1 if a table or number differs from what the results say.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ROOT / "docs" / "paper" / "generated"

Row = Mapping[str, object]
FASTEST = ("near-far t4 k8", "near-far t8 k2", "near-far t8 k0", "window 2-D r8", "hybrid r3 P3", "mlp map", "taylor 3")
"""Operators of the figure of speed, in the order of its legend."""


def read(pattern: str) -> dict[str, object] | None:
    """The newest result whose name fits, or ``None``."""
    found = sorted(RESULTS.glob(pattern), key=lambda path: path.stem)
    return None if not found else dict(json.loads(found[-1].read_text(encoding="utf-8")))


def rows_of(result: Mapping[str, object]) -> list[Row]:
    """The rows of a result."""
    rows = result["rows"]
    assert isinstance(rows, list)
    return rows


def number(row: Row, name: str) -> float:
    """A number of a row; NaN where there is none."""
    value = row[name]
    return float(value) if isinstance(value, int | float) else math.nan


def short(value: float, digits: int = 2) -> str:
    """A number with so many digits that count, without an exponent."""
    if not math.isfinite(value):
        return "--"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{places}f}"


def escaped(text: object) -> str:
    """Text for LaTeX."""
    return str(text).replace("%", r"\%").replace("_", r"\_").replace("&", r"\&").replace("#", r"\#")


def table(columns: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A LaTeX tabular with rules."""
    lines = [" & ".join(cells) + r" \\" for cells in (head, *body)]
    inside = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *inside, r"\end{tabular}", ""])


def operator_table(result: Mapping[str, object]) -> str:
    """Every operator's cost and error on the embedded teacher."""
    body = [
        (
            escaped(row["operator"]),
            escaped(row["setting"]) or "--",
            short(number(row, "cost")),
            short(number(row, "cosine_distance")),
            short(number(row, "cosine_p99")),
        )
        for row in rows_of(result)
    ]
    return table("llrrr", ("operator", "setting", "cost", "mean distance", "99th percentile"), body)


def speed_table(result: Mapping[str, object]) -> str:
    """Speed-up over exact attention on one CPU thread at head width 128."""
    rows = [row for row in rows_of(result) if row["scene"] == "width 128"]
    sizes = sorted({int(number(row, "image")) for row in rows if number(row, "image") >= 1024})
    body = []
    for operator in dict.fromkeys(str(row["operator"]) for row in rows):
        own = {int(number(row, "image")): row for row in rows if row["operator"] == operator}
        if operator != "exact":
            body.append(
                (escaped(operator), *(short(number(own[size], "speed_up")) if size in own else "--" for size in sizes))
            )
    return table("l" + "r" * len(sizes), ("operator", *(f"{size:,}".replace(",", r"\,") for size in sizes)), body)


def scaling_table(result: Mapping[str, object]) -> str:
    """Modelled forward speed-ups at Flux.1-dev's sizes."""
    rows = [row for row in rows_of(result) if row["method"] in ("near-far t4 k8", "near-far t8 k2", "hkr", "taylor P3")]
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    body = []
    for tokens in sorted({int(number(row, "tokens")) for row in rows}):
        own = {str(row["method"]): row for row in rows if number(row, "tokens") == tokens}
        if set(own) == set(methods):
            ceiling = short(number(own[methods[0]], "ceiling"))
            cells = (short(number(own[method], "forward_speed_up")) for method in methods)
            body.append((f"{tokens:,}".replace(",", r"\,"), *cells, ceiling))
    return table("r" * (len(methods) + 2), ("tokens", *map(escaped, methods), "ceiling"), body)


def student_table(result: Mapping[str, object]) -> str:
    """Held-out distance and cost of each student."""
    rows = rows_of(result)
    sizes = sorted({int(number(row, "tokens")) for row in rows})
    body = []
    for name in dict.fromkeys(str(row["student"]) for row in rows):
        own = {int(number(row, "tokens")): row for row in rows if row["student"] == name}
        cells = [
            (short(number(own[size], "cosine_distance")), short(number(own[size], "flops_share")))
            if size in own
            else ("--", "--")
            for size in sizes
        ]
        body.append((escaped(name), *(cell for pair in cells for cell in pair)))
    head = ("student", *(cell for size in sizes for cell in (f"{size}: distance", "cost")))
    return table("l" + "rr" * len(sizes), head, body)


def errors_of(entry: Mapping[str, object]) -> dict[tuple[str, float], list[float]]:
    """Mean held-out error of each seed, by method and level of cost."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    seeds = entry["seeds"]
    assert isinstance(seeds, dict)
    for seed, content in seeds.items():
        for line in content["rows"]:
            key = (str(line["method"]), float(line["level"]))
            found.setdefault(key, {}).setdefault(seed, []).extend(line["errors"])
    return {key: [sum(v) / len(v) for v in own.values()] for key, own in found.items()}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def controller_table(result: Mapping[str, object]) -> str:
    """Held-out error of each method of routing, with standard errors over seeds."""
    students = result["students"]
    assert isinstance(students, dict)
    body, levels = [], sorted({level for entry in students.values() for _, level in errors_of(entry) if level > 0})
    for student, entry in students.items():
        found = errors_of(entry)
        for method in dict.fromkeys(method for method, _ in found):
            cells = []
            for level in levels:
                mean, error = spread(found[method, level]) if (method, level) in found else (math.nan, math.nan)
                cells.append(f"{mean:.4f} $\\pm$ {error:.4f}" if math.isfinite(mean) else "--")
            if any(cell != "--" for cell in cells):
                body.append((escaped(student), escaped(method), *cells))
    head = ("student", "method", *(f"{100 * level:.0f}\\,\\% cost" for level in levels))
    return table("ll" + "r" * len(levels), head, body)


def numbers(
    fidelity: Mapping[str, object] | None,
    speed: Mapping[str, object] | None,
    scaling: Mapping[str, object] | None,
    students: Mapping[str, object] | None,
) -> str:
    """A LaTeX command for each number of the text that a result holds."""
    found = {} if students is None else student_numbers(students)
    if scaling is not None:
        ceilings = {row["tokens"]: number(row, "ceiling") for row in rows_of(scaling)}
        found |= {"ceilingOne": short(ceilings[4608]), "ceilingSixteen": short(ceilings[66048])}
    if fidelity is not None:
        facts = fidelity["facts"]
        assert isinstance(facts, dict)
        found |= {
            "fidelityTokens": f"{facts['image_tokens']:,}".replace(",", r"\,"),
            "fidelityCalls": str(facts["calls"]),
        }
        by_name = {(str(row["operator"]), str(row["setting"])): row for row in rows_of(fidelity)}
        named = {
            "nearFar": ("near-far, chosen tiles of 4", "top 8"),
            "nearOnly": ("near-far, no chosen tiles", "tile 4"),
            "strided": ("strided landmarks", "10%"),
            "pooled": ("pooled landmarks", "tile 4"),
            "window": ("window", "radius 8"),
            "shared": ("hybrid, one denominator", "radius 2"),
            "additive": ("hybrid, additive", "radius 2"),
            "taylorThree": ("Taylor", "P = 3"),
            "taylorFour": ("Taylor", "P = 4"),
        }
        for name, key in named.items():
            found[f"{name}Cost"] = short(number(by_name[key], "cost"))
            found[f"{name}Error"] = short(number(by_name[key], "cosine_distance"))
    if speed is not None:
        facts = speed["facts"]
        assert isinstance(facts, dict)
        found["speedDevice"] = f"{escaped(facts['device'])}, one thread, torch {facts['torch']}"
        by_size = {(row["scene"], row["operator"], row["image"]): row for row in rows_of(speed)}
        for name, operator, image in (
            ("speedFour", "near-far t4 k8", 4096),
            ("speedSixteen", "near-far t8 k2", 16384),
            ("speedMap", "mlp map", 4096),
        ):
            found[name] = short(number(by_size["width 128", operator, image], "speed_up"))
        breaks = speed["break_even"]
        assert isinstance(breaks, list)
        (even,) = (row for row in breaks if (row["scene"], row["operator"]) == ("width 128", "near-far t4 k8"))
        found["breakEven"] = f"{10 * round(number(even, 'measured') / 10):,}".replace(",", r"\,")
    return "".join(rf"\newcommand{{\{name}}}{{{value}}}" + "\n" for name, value in sorted(found.items()))


def student_numbers(result: Mapping[str, object]) -> dict[str, str]:
    """Numbers of the text about students, at 1,024 image tokens."""
    rows = {str(row["student"]): row for row in rows_of(result) if row["tokens"] == 1024}
    found = {"studentUpdates": f"{number(rows['hkr'], 'updates'):.0f}"}
    for name, student in (
        ("blend", "hkr"),
        ("joint", "hkr-joint"),
        ("untrained", "near_far, untrained"),
        ("corrected", "near_far"),
    ):
        found[f"{name}Distance"] = short(number(rows[student], "cosine_distance"))
    for name, student in (("joint", "hkr-joint"), ("corrected", "near_far")):
        found[f"{name}Cost"] = short(number(rows[student], "flops_share"))
    return found


def draw_operators(result: Mapping[str, object], axes: "Axes") -> None:
    """Error against cost, one line per operator."""
    families = list(dict.fromkeys(str(row["operator"]) for row in rows_of(result)))
    for index, family in enumerate(families):
        points = sorted(
            (number(row, "cost"), number(row, "cosine_distance"))
            for row in rows_of(result)
            if row["operator"] == family
        )
        axes.plot(*zip(*points, strict=True), f"C{index}", marker="oosD^vP*X"[index % 9], markersize=4, label=family)
    axes.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="operations, as a share of exact attention's")
    axes.set_ylabel("mean cosine distance")


def draw_speed(result: Mapping[str, object], axes: "Axes") -> None:
    """Speed-up over exact attention by the number of image tokens."""
    for operator in FASTEST:
        scene = "width 16" if operator == "taylor 3" else "width 128"
        own = [row for row in rows_of(result) if (row["scene"], row["operator"]) == (scene, operator)]
        points = sorted((number(row, "image"), number(row, "speed_up")) for row in own)
        if points:
            label = f"{operator} (head width 16)" if scene == "width 16" else operator
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="image tokens", ylabel="speed-up over exact attention")


def draw_controller(result: Mapping[str, object], axes: "Axes") -> None:
    """Held-out error against cost, one line per method, of the first student."""
    students = result["students"]
    assert isinstance(students, dict)
    found = errors_of(next(iter(students.values())))
    for index, method in enumerate(dict.fromkeys(method for method, level in found if level > 0)):
        levels = sorted(level for name, level in found if name == method and level > 0)
        means, bars = zip(*(spread(found[method, level]) for level in levels), strict=True)
        style = {"linestyle": ("-", "--", ":")[index // 10 % 3], "color": f"C{index % 10}"}
        axes.errorbar(levels, means, [bar if math.isfinite(bar) else 0 for bar in bars], marker="o", markersize=3,
                      capsize=2, label=method, **style)  # fmt: skip
    axes.set(xlabel="attention cost, as a share of exact", ylabel="relative error of the latent, held out")


def save(draw: Callable[[Mapping[str, object], "Axes"], None], result: Mapping[str, object], path: Path) -> None:
    """Draw one figure into a PDF that is the same for the same result."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.family": "serif", "font.size": 9, "pdf.fonttype": 42}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.2, 3.9), layout="constrained")
    draw(result, axes)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"CreationDate": None})
    plt.close(figure)


def texts() -> dict[str, str]:
    """Content of every generated LaTeX file by its name."""
    fidelity, speed = read("operator-fidelity.json"), read("cpu-*.json")
    scaling, students = read("scaling-model.json"), read("students-*.json")
    found = {"numbers": numbers(fidelity, speed, scaling, students)}
    sources: tuple[tuple[str, dict[str, object] | None, Callable[[Mapping[str, object]], str]], ...] = (
        ("operators", fidelity, operator_table),
        ("speed", speed, speed_table),
        ("scaling", scaling, scaling_table),
        ("students", students, student_table),
        ("controller", read("controller-*.json"), controller_table),
    )
    found |= {name: write(result) for name, result, write in sources if result is not None}
    return {
        f"{name}.tex": "% From benchmarks/results by scripts/make_figures.py\n" + text for name, text in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare tables and numbers with the results")
    options = parser.parse_args(arguments)
    wanted = texts()
    if options.check:
        there = {path.name: path.read_text(encoding="utf-8") for path in GENERATED.glob("*.tex")}
        stale = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
        for name in stale:
            print(
                f"docs/paper/generated/{name} is not what the results say; run scripts/make_figures.py", file=sys.stderr
            )
        return int(bool(stale))
    GENERATED.mkdir(parents=True, exist_ok=True)
    for path in GENERATED.iterdir():
        path.unlink()
    for name, text in wanted.items():
        (GENERATED / name).write_text(text, encoding="utf-8")
    figures = (("operators", "operator-fidelity.json", draw_operators), ("speed", "cpu-*.json", draw_speed),
               ("controller", "controller-*.json", draw_controller))  # fmt: skip
    for name, pattern, draw in figures:
        result = read(pattern)
        if result is not None:
            save(draw, result, GENERATED / f"{name}.pdf")
    print("\n".join(sorted(path.name for path in GENERATED.iterdir())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
