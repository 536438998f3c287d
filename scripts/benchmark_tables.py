"""Tables in Markdown from the files of ``benchmarks/results``; nothing is computed here but ratios and roundings."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTHING = "not measured"

Row = Mapping[str, object]


class Result(NamedTuple):
    """A result file.

    Attributes:
        name: Its name.
        data: What it holds.
    """

    name: str
    data: Mapping[str, object]

    def rows(self, key: str = "rows") -> list[Row]:
        """A list of the file."""
        found = self.data.get(key, [])
        if not isinstance(found, list):
            raise ValueError(f"{self.name}: {key!r} is no list")
        return found

    def facts(self) -> str:
        """The machine and the versions, in one line."""
        facts = self.data.get("facts")
        if not isinstance(facts, dict):
            facts = {name: value for name, value in self.data.items() if isinstance(value, str | int)}
        facts = {name: value for name, value in facts.items() if name != "platform"}
        return ", ".join(f"{name} {value}" for name, value in facts.items() if value not in ("", "not installed"))


def results(folder: Path = RESULTS) -> list[Result]:
    """Read every result file, in order of their names."""
    return [Result(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def figure(value: object, form: str = ".3g") -> str:
    """A number as it stands in a table; thousands keep all their digits."""
    if value is None:
        return NOTHING
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{form}}"


def share(value: object) -> str:
    """A share in percent."""
    return f"{100 * value:.3g} %" if isinstance(value, int | float) else NOTHING


def times(value: object) -> str:
    """A ratio."""
    return f"{figure(value, '.2f')}x" if isinstance(value, int | float) else NOTHING


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns after the first are numbers and stand to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_kind(found: Sequence[Result], *keys: str) -> Iterator[Result]:
    """The files that have all these parts."""
    return (one for one in found if all(key in one.data for key in keys))


TOKENS = MappingProxyType({"near-far, Flux.1-dev, 2K": 16896, "near-far, Flux.1-dev, 4K": 66048})
"""Sizes of what was asked, by which the cost model knows them."""


def asked(found: Sequence[Result]) -> str:
    """What was asked of the whole forward, beside what was measured and what is modelled."""
    models = [row for one in of_kind(found, "traffic") for row in one.rows()]
    parts = []
    for one in of_kind(found, "asked"):
        rows = []
        for row in one.rows("asked"):
            bound = f"at least {times(row['least'])}" if "least" in row else f"at most {times(row['most'])}"
            met = "" if row["measured"] is None else "yes" if row["met"] else "**no**"
            tokens, method = TOKENS.get(str(row["what"])), str(row["what"]).partition(",")[0]
            here = [m for m in models if m["tokens"] == tokens and str(m["method"]).startswith(method)]
            model = times(max((float(str(m["forward_speed_up"])) for m in here), default=None)) if here else ""
            measured = NOTHING if row["measured"] is None else f"{row['measured']:.4f}x"
            rows.append([str(row["what"]), bound, measured, met, model])
        head = ("", "asked", "measured", "met", "modelled, H100")
        parts.append(f"{one.name}: {one.facts()}.\n\n" + table(head, rows))
    return "\n\n".join(parts) or NOTHING


def forward(found: Sequence[Result]) -> str:
    """Time, memory and ceiling of the whole forward in every scene."""
    parts = []
    for one in of_kind(found, "shares"):
        distances = {str(row["method"]): figure(row["cosine_distance"]) for row in one.rows("fidelity")}
        for scene in sorted(one.rows("shares"), key=lambda row: (str(row["cut"]), int(str(row["tokens"])))):
            text = (
                f"**{scene['scene']}** ({figure(scene['tokens'])} tokens; {scene['cut']}). Attention takes "
                f"{share(scene['profiled'])} of the time, so that the ceiling is {times(scene['ceiling'])}; in the "
                f"whole Flux.1-dev it is {share(scene['whole'])} of the operations, with a ceiling of "
                f"{times(scene['whole_ceiling'])}."
            )
            if scene["declining"]:
                text += f" To decline every call takes {share(scene['declining'])} of the time."
            rows = [_forward_row(row, distances) for row in one.rows() if row["scene"] == scene["scene"]]
            head = ("method", "attention foretold", "forward, ms", "speed-up", "peak memory, MiB", "cosine distance")
            parts.append(text + "\n\n" + table(head, rows))
    return "\n\n".join(parts) or NOTHING


def _forward_row(row: Row, distances: Mapping[str, str]) -> list[str]:
    method = str(row["method"])
    if method == "exact":
        name, foretold, distance = method, "", "0"
    elif row["answered"]:
        name, foretold, distance = method, times(row["foretold"]), distances.get(method, "untrained")
    else:
        name, foretold, distance = f"{method}, declined", times(row["foretold"]), "0"
    if row["milliseconds"] is None:
        return [name, foretold, "exact ran", "", "", distance]
    return [name, foretold, figure(row["milliseconds"]), times(row["speed_up"]), figure(row["peak_memory"]), distance]


def gpu(found: Sequence[Result]) -> str:
    """Whether there is a result of a GPU."""
    names = [one.name for one in of_kind(found, "shares") if "capability" in str(one.data.get("facts"))]
    return f"On a GPU: {', '.join(names) or NOTHING}."


def fidelity(found: Sequence[Result]) -> str:
    """Distances on the embedded teacher."""
    rows = [
        [_learned(row), figure(row["image_tokens"]), figure(row["cosine_distance"]), figure(row["relative_l2"])]
        for one in list(of_kind(found, "fidelity"))[:1]
        for row in one.rows("fidelity")
    ]
    return table(("method", "image tokens", "cosine distance", "relative L2"), rows) if rows else NOTHING


def _learned(row: Row) -> str:
    """Name of a method, with the updates of its students."""
    updates = row.get("updates")
    return f"{row['method']}, {figure(updates)} updates a layer" if updates else str(row["method"])


def promised(found: Sequence[Result]) -> str:
    """Ratios that operators were to reach."""
    parts = []
    for one in of_kind(found, "promised", "break_even"):
        rows = [
            [
                f"{row['operator']}, {row['scene']}",
                figure(row["image"]),
                times(row["least"]),
                times(row["measured"]),
                "yes" if row["met"] else "**no**",
            ]
            for row in one.rows("promised")
        ]
        head = ("operator", "image tokens", "asked", "measured", "met")
        parts.append(f"{one.name}: {one.facts()}.\n\n" + table(head, rows))
    return "\n\n".join(parts) or NOTHING


def operators(found: Sequence[Result]) -> str:
    """Speed-up of every operator over exact attention of the same run, by number of image tokens."""
    parts = []
    for one in of_kind(found, "break_even", "rows"):
        for scene in dict.fromkeys(row["scene"] for row in one.rows()):
            here = [row for row in one.rows() if row["scene"] == scene]
            sizes = sorted({int(str(row["image"])) for row in here})
            cells = {(row["operator"], row["image"]): row for row in here}
            names = dict.fromkeys(row["operator"] for row in here)
            rows = [
                [str(name), *(times((cells.get((name, n)) or {}).get("speed_up")) for n in sizes)] for name in names
            ]
            head = (f"{scene}, image tokens", *(figure(n) for n in sizes))
            parts.append(table(head, rows))
    return "\n\n".join(parts) or NOTHING


def break_even(found: Sequence[Result]) -> str:
    """From how many tokens an operator is faster than exact attention, measured and foretold."""
    rows = []
    for one in of_kind(found, "break_even"):
        for row in one.rows("break_even"):
            cells = (
                figure(_or(row[key], f"over {row['most']}"), ".0f") for key in ("measured", "calibrated", "stored")
            )
            rows.append([f"{row['scene']}: {row['operator']}", *cells, times(row["error"])])
    head = ("operator", "measured", "model, fitted to half", "stored model", "largest error of a time")
    return table(head, rows) if rows else NOTHING


def _or(value: object, otherwise: str) -> object:
    return otherwise if value is None else value


def operator_fidelity(found: Sequence[Result]) -> str:
    """Error against cost of every operator on the embedded teacher."""
    rows = [
        [
            f"{row['operator']} {row['setting']}".strip(),
            share(row["cost"]),
            figure(row["cosine_distance"]),
            figure(row["cosine_p99"]),
            share(row["undefined"]),
        ]
        for one in found
        if one.name == "operator-fidelity.json"
        for row in one.rows()
    ]
    head = ("operator", "operations of exact attention", "cosine distance", "99th percentile", "undefined")
    return table(head, rows) if rows else NOTHING


def scaling(found: Sequence[Result]) -> str:
    """Modelled times up to a million tokens."""
    rows = []
    for one in of_kind(found, "traffic"):
        for row in one.rows():
            keys = figure(row["keys"]) if row["keys"] is not None else ""
            speeds = [times(row[key]) for key in ("attention_speed_up", "forward_speed_up", "ceiling")]
            rows.append([str(row["method"]), figure(row["tokens"]), keys, figure(row["attention_ms"]), *speeds])
    head = ("method", "tokens", "keys per query", "attention, ms", "speed-up", "forward's speed-up", "its ceiling")
    return table(head, rows) if rows else NOTHING


def traffic(found: Sequence[Result]) -> str:
    """Bytes that a rank receives."""
    names = ("border", "pooled", "text", "ring", "total", "all_keys")
    rows = [
        [f"{row['ranks']} ranks, {row['method']}", figure(row["tokens"]), *(_mebibytes(row[name]) for name in names)]
        for one in of_kind(found, "traffic")
        for row in one.rows("traffic")
    ]
    head = ("", "tokens", "border, MiB", "pooled", "text", "ring", "in all", "ring attention")
    return table(head, rows) if rows else NOTHING


def _mebibytes(value: object) -> str:
    return figure(value / 2**20) if isinstance(value, int | float) else NOTHING


KNOWN = ("shares", "break_even", "traffic")


def others(found: Sequence[Result]) -> str:
    """Result files of other scripts, as they are."""
    parts = []
    for one in found:
        if one.name == "operator-fidelity.json" or any(key in one.data for key in KNOWN):
            continue
        tables = [flat for flat in (_flat(value) for value in one.data.values()) if flat]
        if tables:
            parts.append("\n\n".join([f"{one.name}: {one.facts()}.", *tables]))
    return "\n\n".join(parts)


def _flat(value: object) -> str:
    """A list of rows, or rows by name, as a table of what is neither list nor object; empty if it is neither."""
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        value = [{"": name, **row} for name, row in value.items()]
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return ""
    every = dict.fromkeys(name for row in value for name in row)
    names = [name for name in every if not any(isinstance(row.get(name), list | dict) for row in value)]
    if len(names) < 2:
        return ""
    cells = [[figure(_or(row.get(name), "")) for name in names] for row in value]
    return table([name.replace("_", " ") for name in names], cells)


BLOCKS: Mapping[str, Callable[[Sequence[Result]], str]] = MappingProxyType(
    {
        "asked": asked,
        "break-even": break_even,
        "fidelity": fidelity,
        "forward": forward,
        "gpu": gpu,
        "operator-fidelity": operator_fidelity,
        "operators": operators,
        "others": others,
        "promised": promised,
        "scaling": scaling,
        "traffic": traffic,
    }
)
"""Generated blocks by name; a document holds one between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``."""
