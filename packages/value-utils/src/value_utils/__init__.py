"""Sweeps, seed batches and prompt lists: plain lists from what a person types, standard library only."""

from value_utils.parse import MAX_ENTRIES, parse_clock, parse_numbers
from value_utils.prompts import load_prompts
from value_utils.seeds import MAX_SEED, seed_batch
from value_utils.sweep import clocked_sweep, combinations

__all__ = [
    "MAX_ENTRIES",
    "MAX_SEED",
    "clocked_sweep",
    "combinations",
    "load_prompts",
    "parse_clock",
    "parse_numbers",
    "seed_batch",
]
