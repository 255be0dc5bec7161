"""Refits of checkpoints that other tools made of cot-22m: KL, top-1 and right answers before and after.

    python benchmarks/refit_others.py --model DIR --eval DIR --checkpoints DIR [DIR ...] --out results.json
    python benchmarks/tables.py results.json --against "as it came"

A checkpoint is a folder TOOL_GRID_rowsSEED as `make_others.py` makes them (or any other name: its rows are then those
of seed 1). It is refitted on the rows that its tool had, `rows(tokenizer, 512, SEED)` of eval/cot_rows.py, of which the
last 16 are held out, with the seed of the rows; or with --seeds on the rows of each. Measured on the development rows
`rows(tokenizer, 64, 2000)`, on `final_rows` and by problems of the five tasks, of the files as they are read back from
disk. A refit that is no better on its held-out rows writes nothing: then the figures are those of what came. One
process for each checkpoint and seed; the polish goes on from the block that was refitted without it.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import problems
import torch
from measuring import Measuring, as_rows, cot_tests, kl_line
from processes import each, empty, save

import logitwise
from logitwise.errors import UnmetError
from logitwise.recipe import REFIT, parse_settings
from logitwise.skeleton import Skeleton
from logitwise.source import Source, open_source, open_stored

SETTINGS = {
    **{"steps": 300, "polish_steps": 300, "batch": 8, "compute_dtype": "float32"},
    **{"rows": 512, "row_tokens": 256, "held_out": 16},
}
"""Of every refit; what begins with polish_, of those that polish."""
CAME = "as it came"
VARIANTS: dict[str, dict[str, Any]] = {
    "refit": {},
    "refit+polish": {"polish": True},
    "refit K=2": {"final_blocks": 2},
    "refit K=2+polish": {"final_blocks": 2, "polish": True},
    "refit K=4": {"final_blocks": 4},
    "refit K=4+polish": {"final_blocks": 4, "polish": True},
}


def main() -> None:
    """The parent starts a process for each checkpoint and seed, and gathers what they have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--checkpoints", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", nargs="+", type=int, help="of rows and fit; that of its own rows by default")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS][:2], choices=VARIANTS)
    parser.add_argument("--rows", type=int, default=SETTINGS["rows"])
    parser.add_argument("--tests", nargs="+", help="rows to measure on; development and final ones by default")
    parser.add_argument("--problems", type=int, default=0, help="of each of the five tasks, answered greedily")
    parser.add_argument("--harder", type=int, default=0, help="of each length, longer than the model was made for")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys of every refit, as key=value")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        work(given)
        return
    of_each = {place: given.seeds or [tool_grid_seed(place)[2]] for place in given.checkpoints}
    each(given, [["--checkpoints", str(place), "--seeds", str(seed)] for place in of_each for seed in of_each[place]])


def tool_grid_seed(checkpoint: Path) -> tuple[str, str, int]:
    """What a folder's name says: the tool, the grid, the seed of the rows it was made with."""
    found = re.fullmatch(r"(.+)_(w\d+\w*)_rows(\d+)", checkpoint.name)
    return (found[1], found[2], int(found[3])) if found else ("", checkpoint.name, 1)


def work(given: argparse.Namespace) -> None:
    """One checkpoint and seed: as it came, and every refit of it."""
    sys.path.insert(0, str(given.eval))
    from cot_rows import rows as cot_rows

    (checkpoint,), (seed,) = given.checkpoints, given.seeds
    tool, grid, own = tool_grid_seed(checkpoint)
    source = open_source(given.model)
    tokenizer = source.tokenizer()
    train = as_rows(cot_rows(tokenizer, given.rows, seed))
    skeleton = Skeleton(source, torch.device(given.device), torch.float32)
    tests = cot_tests(tokenizer)
    measuring = Measuring(skeleton, source, {name: tests[name] for name in given.tests or tests})
    asked = problems.usual(given.problems) + problems.harder(given.harder)
    base = {**SETTINGS, "rows": given.rows, "device": given.device, "seed": seed, **parse_settings(given.set)}
    found: list[dict[str, Any]] = []

    def add(variant: str, made: Source, began: float, **more: Any) -> None:
        empty()
        figures = measuring(made)
        row = {"grid": f"{tool} {grid}".strip(), "seed": seed, "variant": variant, "fitted_by": "lfq", **more}
        row |= {"rows_seed_of_the_tool": own, "settings": given.set, "figures": figures}
        row["accuracy"] = problems.accuracy(made, skeleton.device, asked) if asked else None
        found.append({**row, "seconds": round(time.monotonic() - began, 1)})
        save(given.only, found)
        right = " ".join(f"{kind} {sum(each) / len(each):.3f}" for kind, each in (row["accuracy"] or {}).items())
        less = 1 - figures["development"]["kl"]["mean"] / found[0]["figures"]["development"]["kl"]["mean"]
        print(f"{checkpoint.name} seed {seed} {variant}: {kl_line(figures)} ({less:.1%} less) {right}", flush=True)

    add(CAME, open_stored(checkpoint), time.monotonic())
    with tempfile.TemporaryDirectory() as temporary:
        run, out = Path(temporary) / "run", Path(temporary) / "out"
        for name in given.variants:
            began, asks = time.monotonic(), {**base, **VARIANTS[name]}
            read = {key: asks[key] for key in asks if "polish" in asks or not key.startswith("polish_")}
            recipe = logitwise.Recipe.load(REFIT, **read)
            try:
                result = logitwise.refit(
                    checkpoint,
                    out,
                    original=given.model,
                    recipe=recipe,
                    rows=train,
                    run_folder=run,
                    keep_run=True,
                    overwrite=True,
                )
            except UnmetError as error:
                add(name, open_stored(checkpoint), began, refused=error.why)
                continue
            held_out = {"before": result.before.kl.mean, "after": result.after.kl.mean}
            add(name, open_stored(out), began, held_out_kl=held_out, changed=result.changed)


if __name__ == "__main__":
    main()
