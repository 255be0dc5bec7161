"""Markdown tables of what benchmarks/lfq_variants.py found, with paired bootstrap intervals.

    python benchmarks/tables.py results.json [more.json ...] [--against mse] [--paired]

An interval of KL is over development rows, which are drawn again 10,000 times, the same ones for both variants; seeds
are averaged first. Top-1, perplexity and the KL of each kind of text are of the final rows, where there are any. The
standard error of a share of right answers is over problems, seeds averaged first: seeds answer the same problems; with
--paired there is also how many more of the same problems are right, over problems and seeds drawn again. Where
problems longer than usual were answered, a second table has them by kind; intervals there are over problems and seeds.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Answers = NDArray[np.int64]
"""Of each seed, whether it has each problem right."""

DRAWS = 10_000
FULL = "full precision"
PLACES = {"final both": "final rows", "final solutions": "of them solutions", "final chat": "chat"}


def main() -> None:
    """Prints a table for each grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--against", default="mse")
    parser.add_argument("--paired", action="store_true", help="right answers beside those of --against, one by one")
    given = parser.parse_args()
    grids: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for file in given.files:
        for row in json.loads(file.read_text())["results"]:
            grids[title(row)][row["variant"]][row["seed"]] = row
    full = next((found[FULL] for found in grids.values() if FULL in found), {})
    for grid, variants in grids.items():
        rows = [row for by_seed in variants.values() for row in by_seed.values()]
        places = {place: PLACES[place] for place in PLACES if all(place in row["figures"] for row in rows)}
        columns = ["variant", "seeds", "KL, development", f"less than {given.against}, 95 %", *places.values()]
        asked = any(not is_harder(kind) for row in rows for kind in row.get("accuracy") or {})
        columns += ["top-1", "perplexity", *(["accuracy"] if asked else [])]
        paired = asked and given.paired
        columns += [f"more right than {given.against}, 95 %"] if paired else []
        print(f"\n{grid}\n\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
        for name, by_seed in variants.items():
            found = list(by_seed.values())
            back = sum(fell_back(row) for row in found)
            mark = f" (MSE fit kept in {back} of {len(found)})" if back else ""
            cells = [f"{name}{mark}", str(len(found)), f"{mean(found, 'development', 'kl'):.4f}"]
            cells += [interval(by_seed, variants.get(partner(name, given.against), {}))]
            cells += [f"{mean(found, place, 'kl'):.4f}" for place in places]
            last = next(iter(places), "development")
            cells += [f"{mean(found, last, 'top1'):.4f}", f"{mean(found, last, 'perplexity'):.3f}"]
            cells += [share(right(found, is_usual))] if asked else []
            if paired:
                other = variants.get(partner(name, given.against), {})
                seeds = [seed for seed in by_seed if seed in other and other is not by_seed]
                both = [right([rows[seed] for seed in seeds], is_usual) for rows in (by_seed, other)]
                cells += [more(*both) if both[0].size else ""]
            print(f"| {' | '.join(cells)} |")
        harder({FULL: full} | variants, given.against)


def title(row: dict[str, Any]) -> str:
    """Of a row's table: its grid, what it was calibrated on, and settings of all variants."""
    kind = row.get("calibration", "both")
    return ", ".join(
        [row["grid"], *(row.get("settings") or []), *([] if kind == "both" else [f"calibrated on {kind}"])]
    )


def partner(name: str, against: str) -> str:
    """The variant that another is compared with: of the same setting, where they have one ("method=lrq: lfq")."""
    each, separator, _ = name.rpartition(": ")
    return each + separator + against


def mean(rows: list[dict[str, Any]], place: str, figure: str) -> float:
    """A figure on some rows of text, averaged over seeds."""
    return float(np.mean([row["figures"][place][figure]["mean"] for row in rows]))


def fell_back(row: dict[str, Any]) -> bool:
    """Whether the objective's fit was no better on held-out rows, so that the checkpoint is that of the MSE fit."""
    return row["fitted_by"] == "mse" and not row["variant"].rpartition(": ")[2].startswith(("mse", "rtn"))


def harder(variants: dict[str, dict[int, Any]], against: str) -> None:
    """A table of problems longer than the model was made for, where they were asked: a row for each kind."""
    given = {
        name: found
        for name, by_seed in variants.items()
        if (found := [by_seed[seed] for seed in sorted(by_seed)]) and right(found, is_harder).size
    }
    if set(given) <= {FULL}:
        return
    others = [name for name in given if name not in (FULL, against)] if against in given else []
    columns = ["kind", *given, *(f"{name} more than {against}, 95 %" for name in others)]
    print(f"\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    kinds = [kind for kind in given[against if others else next(iter(given))][0]["accuracy"] if is_harder(kind)]
    for title, some in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
        answers = {name: right(found, some.__contains__) for name, found in given.items()}
        cells = [title, *map(share, answers.values())]
        cells += [more(answers[name], answers[against]) for name in others]
        print(f"| {' | '.join(cells)} |")


def is_usual(kind: str) -> bool:
    """Whether problems of a kind are as long as those of its task."""
    return not is_harder(kind)


def is_harder(kind: str) -> bool:
    """Whether problems of a kind ("sum of 9") are longer than those of its task."""
    return " of " in kind


def right(rows: list[dict[str, Any]], wanted: Callable[[str], bool]) -> Answers:
    """Which problems of the wanted kinds were answered right, by seed; seeds that were not asked are left out."""
    answers = [
        [answer for kind, every in (row.get("accuracy") or {}).items() if wanted(kind) for answer in every]
        for row in rows
    ]
    return np.array([every for every in answers if every])


def share(answers: Answers) -> str:
    """The share of answers that are right, and its standard error over problems; empty where there are none."""
    if not answers.size:
        return ""
    by_problem = answers.mean(0)
    return f"{by_problem.mean():.3f} ± {by_problem.std() / len(by_problem) ** 0.5:.3f}"


def more(one: Answers, other: Answers) -> str:
    """How many more of the problems `one` has right, and the 95 % interval, over seeds and problems drawn again."""
    gained = one - other
    seeds, problems = gained.shape
    rng = np.random.default_rng(0)
    drawn = [
        gained[np.ix_(rng.integers(seeds, size=seeds), rng.integers(problems, size=problems))].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{gained.mean():.3f} ({low:.3f} to {high:.3f})"


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
