"""Markdown tables of what benchmarks/lfq_variants.py found, with paired bootstrap intervals.

    python benchmarks/tables.py results.json [more.json ...] [--against mse]

An interval is over development rows, which are drawn again 10,000 times, the same ones for both variants; seeds are
averaged first. Top-1, perplexity and the KL of each kind of text are of the final rows, where there are any.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 10_000
PLACES = {"final both": "final rows", "final solutions": "of them solutions", "final chat": "chat"}


def main() -> None:
    """Prints a table for each grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--against", default="mse")
    given = parser.parse_args()
    grids: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for file in given.files:
        for row in json.loads(file.read_text())["results"]:
            kind = row.get("calibration", "both")
            grid = row["grid"] if kind == "both" else f"{row['grid']}, calibrated on {kind}"
            grids[grid][row["variant"]][row["seed"]] = row
    for grid, variants in grids.items():
        rows = [row for by_seed in variants.values() for row in by_seed.values()]
        places = {place: PLACES[place] for place in PLACES if all(place in row["figures"] for row in rows)}
        columns = ["variant", "seeds", "KL, development", f"less than {given.against}, 95 %", *places.values()]
        asked = any(row.get("accuracy") for row in rows)
        columns += ["top-1", "perplexity", *(["accuracy"] if asked else [])]
        print(f"\n{grid}\n\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
        for name, by_seed in variants.items():
            found = list(by_seed.values())
            back = sum(fell_back(row) for row in found)
            mark = f" (MSE fit kept in {back} of {len(found)})" if back else ""
            cells = [f"{name}{mark}", str(len(found)), f"{mean(found, 'development', 'kl'):.4f}"]
            cells += [interval(by_seed, variants.get(given.against, {}))]
            cells += [f"{mean(found, place, 'kl'):.4f}" for place in places]
            last = next(iter(places), "development")
            cells += [f"{mean(found, last, 'top1'):.4f}", f"{mean(found, last, 'perplexity'):.3f}"]
            cells += (
                [accuracy([row["accuracy"] for row in found if row.get("accuracy")])] if "accuracy" in columns else []
            )
            print(f"| {' | '.join(cells)} |")
        harder(variants)


def mean(rows: list[dict[str, Any]], place: str, figure: str) -> float:
    """A figure on some rows of text, averaged over seeds."""
    return float(np.mean([row["figures"][place][figure]["mean"] for row in rows]))


def fell_back(row: dict[str, Any]) -> bool:
    """Whether the objective's fit was no better on held-out rows, so that the checkpoint is that of the MSE fit."""
    return row["fitted_by"] == "mse" and not row["variant"].rpartition(": ")[2].startswith(("mse", "rtn"))


def harder(variants: dict[str, dict[int, Any]]) -> None:
    """A table of problems longer than the model was made for, where they were asked: a column for each kind."""
    given = [found.get("accuracy") or {} for by_seed in variants.values() for found in by_seed.values()]
    kinds = list(dict.fromkeys(kind for tasks in given for kind in tasks if is_harder(kind)))
    if kinds:
        print("\n| variant | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for name, by_seed in variants.items():
        if kinds:
            cells = (
                share([(found.get("accuracy") or {}).get(kind, []) for found in by_seed.values()]) for kind in kinds
            )
            print(f"| {name} | {' | '.join(cells)} |")


def is_harder(kind: str) -> bool:
    """Whether problems of a kind ("sum of 9") are longer than those of its task."""
    return " of " in kind


def accuracy(by_seed: list[dict[str, list[int]]]) -> str:
    """The share of problems answered right over the five tasks."""
    return share([answers for tasks in by_seed for kind, answers in tasks.items() if not is_harder(kind)])


def share(answers: list[list[int]]) -> str:
    """The share of answers that are right, and its standard error; empty where there are none."""
    right = [answer for part in answers for answer in part]
    if not right:
        return ""
    mean = float(np.mean(right))
    return f"{mean:.3f} ± {(mean * (1 - mean) / len(right)) ** 0.5:.3f}"


def interval(one: dict[int, Any], other: dict[int, Any]) -> str:
    """How much less the KL of `one` is than that of `other` on the seeds of both, and its 95 % interval."""
    seeds = sorted(set(one) & set(other))
    if one is other or not seeds:
        return ""
    one, other = ({seed: rows[seed]["figures"]["development"]["kl_by_row"] for seed in seeds} for rows in (one, other))
    sums = np.mean([np.subtract(other[seed], one[seed])[:, 0] for seed in seeds], axis=0)
    counts = np.array(one[seeds[0]])[:, 1]
    drawn = np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return f"{sums.sum() / counts.sum():.4f} ({low:.4f} to {high:.4f})"


if __name__ == "__main__":
    main()
