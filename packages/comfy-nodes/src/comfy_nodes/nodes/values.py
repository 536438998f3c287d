"""Seeds, prompts and numbers for a series of runs.

Every output is a list output: what is linked to it runs once for each entry.
"""

import hashlib
from pathlib import Path

from comfy_api.latest import io
from value_utils import MAX_SEED, clocked_sweep, combinations, load_prompts, parse_numbers, seed_batch

from ..schema import node_schema

CATEGORY = "advanced/scheduling"
NUMBERS = "Numbers separated by commas, spaces or new lines, a JSON list, or a link to a number, a list or a tensor."


class RandomSeedBatch(io.ComfyNode):  # type: ignore[misc]
    """Many seeds from one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return node_schema(
            node_id="RandomSeedBatch",
            display_name="Random Seed Batch",
            category=CATEGORY,
            search_aliases=["seeds", "batch of seeds", "random numbers", "series"],
            description="Draws a list of seeds from one seed. The same seed gives the same list on every machine, "
            "and a longer list begins with the shorter one.",
            inputs=[
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED, tooltip="Start of the sequence; it decides the whole list."
                ),
                io.Int.Input("count", default=8, min=1, max=4096, tooltip="How many seeds to draw."),
            ],
            outputs=[
                io.Int.Output(
                    "seeds", is_output_list=True, tooltip="The seeds; a sampler linked to them runs once for each."
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, seed: int, count: int) -> io.NodeOutput:
        """Draw the seeds."""
        return io.NodeOutput(seed_batch(seed, count))


class LoadPromptListFromJSON(io.ComfyNode):  # type: ignore[misc]
    """Prompts from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return node_schema(
            node_id="LoadPromptListFromJSON",
            display_name="LoadPromptListFromJSON",
            category=CATEGORY,
            search_aliases=["prompts from file", "prompt list", "json", "series"],
            description='Reads a list of prompts from a JSON file such as ["a red apple", "a blue house"]. '
            "The file is read again when it has changed.",
            inputs=[
                io.String.Input(
                    "json_path",
                    default="",
                    tooltip="Path of the JSON file (UTF-8): absolute, or relative to the folder ComfyUI was started in "
                    "or to its input folder.",
                )
            ],
            outputs=[
                io.String.Output(
                    "prompts", is_output_list=True, tooltip="The prompts; an encoder linked to them runs once for each."
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def fingerprint_inputs(cls, json_path: str | None) -> str | float:
        """Tell ComfyUI whether the file has changed since the last run; a path that comes by a link is always read."""
        if json_path is None:
            return float("nan")
        try:
            return hashlib.sha256(_prompt_file(json_path).read_bytes()).hexdigest()
        except OSError:
            return "unreadable"

    @classmethod
    def execute(cls, json_path: str) -> io.NodeOutput:
        """Read the prompts."""
        return io.NodeOutput(load_prompts(_prompt_file(json_path) if json_path.strip() else ""))


class ClockedSweepValues(io.ComfyNode):  # type: ignore[misc]
    """Values spread evenly over a number of runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return node_schema(
            node_id="ClockedSweepValues",
            display_name="Clocked Sweep Values",
            category=CATEGORY,
            search_aliases=["sweep", "schedule", "series of values", "parameter sweep"],
            description="Holds each value for an equal share of the clock: 7 entries and 1, 2, 3 give "
            "1, 1, 1, 2, 2, 3, 3.",
            inputs=[
                _numbers(
                    "clock",
                    "0, 1, 2 or 30",
                    "How many entries to make: a lone whole number is that many, a list counts its entries, and empty "
                    "or 0 means one for each value.",
                ),
                _numbers("values", "0.1, 0.2, 0.3", f"The values to go through. {NUMBERS} 30 is the one value 30."),
            ],
            # An older ComfyUI refuses a schema in which an input and an output share an id.
            outputs=[
                io.Float.Output(
                    "swept", display_name="values", is_output_list=True, tooltip="One value for each clock entry."
                )
            ],
            is_input_list=True,
            is_experimental=True,
        )

    @classmethod
    def execute(cls, clock: list[object], values: list[object]) -> io.NodeOutput:
        """Spread the values."""
        return io.NodeOutput(clocked_sweep(_unwrap(clock), _unwrap(values)))


class Combinations(io.ComfyNode):  # type: ignore[misc]
    """Every combination of up to four lists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return node_schema(
            node_id="Combinations",
            display_name="Combinations",
            category=CATEGORY,
            search_aliases=["grid search", "product", "pairs", "parameter sweep"],
            description="Pairs every entry of each list with every entry of the others: 1, 2, 3 and 4, 5 give "
            "six pairs.",
            inputs=[
                _numbers("a", None, f"First list. {NUMBERS}"),
                _numbers("b", None, f"Second list, may be empty. {NUMBERS}", optional=True),
                _numbers("c", None, f"Third list, may be empty. {NUMBERS}", optional=True),
                _numbers("d", None, f"Fourth list, may be empty. {NUMBERS}", optional=True),
            ],
            outputs=[
                io.Float.Output(
                    f"{name}_out",
                    is_output_list=True,
                    tooltip=f"The entry of {name} in each combination; nothing if {name} is empty.",
                )
                for name in "abcd"
            ],
            is_input_list=True,
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        a: list[object],
        b: list[object] | None = None,
        c: list[object] | None = None,
        d: list[object] | None = None,
    ) -> io.NodeOutput:
        """Combine the lists that are not empty."""
        lists = {name: parse_numbers(_unwrap(value), name) for name, value in zip("abcd", (a, b, c, d), strict=True)}
        if not lists["a"]:
            raise ValueError("a is empty; write at least one number, for example 1, 2, 3")
        used = {name: numbers for name, numbers in lists.items() if numbers}
        columns = dict(zip(used, combinations(list(used.values())), strict=True))
        return io.NodeOutput(*(columns.get(name, []) for name in lists))


def _numbers(name: str, placeholder: str | None, tooltip: str, *, optional: bool = False) -> io.Input:
    """A text field for numbers that takes a link of any type as well."""
    text = io.String.Input(name, multiline=True, placeholder=placeholder, tooltip=tooltip, optional=optional)
    # An older host takes the last for a type of its own, not for every type.
    return io.MultiType.Input(text, [io.Float, io.Int, io.AnyType])


def _unwrap(value: list[object] | None) -> object:
    """What was typed or linked. A node that takes lists gets every input as a list, a single value as a list of one."""
    return value[0] if value is not None and len(value) == 1 else value


def _prompt_file(json_path: str) -> Path:
    """The path as it stands, or in ComfyUI's input folder if a relative path leads nowhere."""
    import folder_paths

    path = Path(json_path.strip()).expanduser()
    return path if path.exists() else Path(folder_paths.get_input_directory(), path)
