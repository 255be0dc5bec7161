"""Markdown tables of what benchmarks/lfq_variants.py found, with paired bootstrap intervals.

    python benchmarks/tables.py results.json [more.json ...] [--where development] [--against mse]

An interval is over rows, which are drawn again 10,000 times, the same ones for both variants; seeds are averaged first.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 10_000


def main() -> None:
    """Prints a table for each grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--where", default="development")
    parser.add_argument("--against", default="mse")
    given = parser.parse_args()
    grids: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for file in given.files:
        for row in json.loads(file.read_text())["results"]:
            grids[row["grid"]][row["variant"]][row["seed"]] = row["figures"][given.where]
    for grid, variants in grids.items():
        print(f"\n{grid}, {given.where} rows\n")
        print(f"| variant | seeds | KL | less than {given.against}, 95 % | top-1 | perplexity |")
        print("|---" * 6 + "|")
        for name, by_seed in variants.items():
            print(f"| {name} | {line(by_seed, variants.get(given.against, {}))} |")


def line(by_seed: dict[int, Any], against: dict[int, Any]) -> str:
    """The cells of a variant: means over its seeds, and the interval of what it gains on the seeds of both."""

    def mean(figure: str) -> float:
        return float(np.mean([found[figure]["mean"] for found in by_seed.values()]))

    shared = sorted(set(by_seed) & set(against))
    gain = "" if by_seed is against or not shared else interval(by_seed, against, shared)
    return f"{len(by_seed)} | {mean('kl'):.4f} | {gain} | {mean('top1'):.4f} | {mean('perplexity'):.3f}"


def interval(one: dict[int, Any], other: dict[int, Any], seeds: list[int]) -> str:
    """How much less the KL of `one` is than that of `other`, and its 95 % interval."""
    sums = np.mean([np.subtract(other[s]["kl_by_row"], one[s]["kl_by_row"])[:, 0] for s in seeds], axis=0)
    counts = np.array(one[seeds[0]]["kl_by_row"])[:, 1]
    drawn = np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return f"{sums.sum() / counts.sum():.4f} ({low:.4f} to {high:.4f})"


if __name__ == "__main__":
    main()
