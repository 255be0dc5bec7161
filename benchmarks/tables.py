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
            own = {"accuracy": row.get("accuracy"), "fell_back": fell_back(row)}
            kind = row.get("calibration", "both")
            grid = row["grid"] if kind == "both" else f"{row['grid']}, calibrated on {kind}"
            grids[grid][row["variant"]][row["seed"]] = {**row["figures"][given.where], **own}
    for grid, variants in grids.items():
        print(f"\n{grid}, {given.where} rows\n")
        asked = any(found["accuracy"] for by_seed in variants.values() for found in by_seed.values())
        end = " accuracy |" if asked else ""
        print(f"| variant | seeds | KL | less than {given.against}, 95 % | top-1 | perplexity |{end}")
        print("|---" * (7 if asked else 6) + "|")
        for name, by_seed in variants.items():
            back = sum(found["fell_back"] for found in by_seed.values())
            mark = f" (MSE fit kept in {back} of {len(by_seed)})" if back else ""
            right = f" {accuracy([found['accuracy'] for found in by_seed.values()])} |" if asked else ""
            print(f"| {name}{mark} | {line(by_seed, variants.get(given.against, {}))} |{right}")
        harder(variants)


def line(by_seed: dict[int, Any], against: dict[int, Any]) -> str:
    """The cells of a variant: means over its seeds, and the interval of what it gains on the seeds of both."""

    def mean(figure: str) -> float:
        return float(np.mean([found[figure]["mean"] for found in by_seed.values()]))

    shared = sorted(set(by_seed) & set(against))
    gain = "" if by_seed is against or not shared else interval(by_seed, against, shared)
    return f"{len(by_seed)} | {mean('kl'):.4f} | {gain} | {mean('top1'):.4f} | {mean('perplexity'):.3f}"


def fell_back(row: dict[str, Any]) -> bool:
    """Whether the objective's fit was no better on held-out rows, so that the checkpoint is that of the MSE fit."""
    return row["fitted_by"] == "mse" and not row["variant"].rpartition(": ")[2].startswith(("mse", "rtn"))


def harder(variants: dict[str, dict[int, Any]]) -> None:
    """A table of problems longer than the model was made for, where they were asked: a column for each kind."""
    given = [found["accuracy"] or {} for by_seed in variants.values() for found in by_seed.values()]
    kinds = list(dict.fromkeys(kind for tasks in given for kind in tasks if is_harder(kind)))
    if kinds:
        print("\n| variant | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for name, by_seed in variants.items():
        if kinds:
            cells = (share([(found["accuracy"] or {}).get(kind, []) for found in by_seed.values()]) for kind in kinds)
            print(f"| {name} | {' | '.join(cells)} |")


def is_harder(kind: str) -> bool:
    """Whether problems of a kind ("sum of 9") are longer than those of its task."""
    return " of " in kind


def accuracy(by_seed: list[dict[str, list[int]] | None]) -> str:
    """The share of problems answered right over the five tasks."""
    return share([answers for tasks in by_seed for kind, answers in (tasks or {}).items() if not is_harder(kind)])


def share(answers: list[list[int]]) -> str:
    """The share of answers that are right, and its standard error; empty where there are none."""
    right = [answer for part in answers for answer in part]
    if not right:
        return ""
    mean = float(np.mean(right))
    return f"{mean:.3f} ± {(mean * (1 - mean) / len(right)) ** 0.5:.3f}"


def interval(one: dict[int, Any], other: dict[int, Any], seeds: list[int]) -> str:
    """How much less the KL of `one` is than that of `other`, and its 95 % interval."""
    sums = np.mean([np.subtract(other[s]["kl_by_row"], one[s]["kl_by_row"])[:, 0] for s in seeds], axis=0)
    counts = np.array(one[seeds[0]]["kl_by_row"])[:, 1]
    drawn = np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return f"{sums.sum() / counts.sum():.4f} ({low:.4f} to {high:.4f})"


if __name__ == "__main__":
    main()
