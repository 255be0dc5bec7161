"""When the logit objective helps, on cot-22m: variants of the final blocks' fit and the polish, by grid and seed.

    python benchmarks/lfq_variants.py --model DIR --eval DIR --out results.json [--jobs 12] [--variants mse lfq ...]

Calibrated on `rows(tokenizer, 512, 1)` of eval/cot_rows.py, or as --calibration says: its worked solutions or its chat
answers alone, WikiText, the model's own answers to the prompts that ship with logitwise (`own`) or to the prompts of
the tasks and of the chats, without their solutions (`own-tasks`). Measured on the development rows `rows(tokenizer, 64,
2000)` and on `final_rows`, by the checkpoints as they are read back from disk. One process for each grid and seed;
variants of a process share the blocks that they have in common. `benchmarks/tables.py` makes the tables.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import own_text
import problems
import torch
from measuring import Measuring, as_rows, cot_tests, kl_line
from processes import each_grid_and_seed, empty, save

import logitwise
from logitwise.recipe import parse_settings
from logitwise.skeleton import Skeleton
from logitwise.source import open_source
from logitwise.windows import roles_of

GRIDS: dict[str, dict[str, Any]] = {
    "w2g64": {"bits": 2, "group_size": 64},
    "w2ch": {"bits": 2, "group_size": None},
    "w3ch": {"bits": 3, "group_size": None},
    "w4ch": {"bits": 4, "group_size": None},
    "w3g64": {"bits": 3, "group_size": 64},
    "w4g64": {"bits": 4, "group_size": 64},
    **{f"target {bits}": {"target_bits": bits, "scale_dtype": "float16"} for bits in (2.5, 3.0)},
    **{f"even {bits}": {"target_bits": bits, "scale_dtype": "float16", "sensitivity": "even"} for bits in (2.5, 3.0)},
}
COMMON: dict[str, Any] = {"start_last": "start"}
"""The start of all other blocks, so that variants differ in the objective alone; "from mse" is the default."""
FITS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "objective": "mse"},
    "mse": {"objective": "mse"},
    "mse, last 600 steps": {"objective": "mse", "steps_last": 600},
    "logit_mse": {"objective": "logit_mse", **COMMON},
    "hard_labels": {"objective": "hard_labels", **COMMON},
    "lfq": COMMON,
    "lfq K=2": {"final_blocks": 2, **COMMON},
    "lfq K=4": {"final_blocks": 4, **COMMON},
    "lfq K=4 shrinking": {"final_blocks": 4, "shrink": True, **COMMON},
    "lfq from mse": {},
    "lfq K=2 from mse": {"final_blocks": 2},
    "lfq K=4 from mse": {"final_blocks": 4},
    "lfq K=12 from mse": {"final_blocks": 12},
    "lfq quantized teacher": {"teacher_last": "quantized", **COMMON},
}
KINDS = ("both", "solutions", "chat", "wikitext", "own", "own-tasks")
POLISH: dict[str, dict[str, Any]] = {
    "+polish": {"polish": True},
    "+slow polish": {  # a quarter of the usual rates
        "polish": True,
        "polish_learning": {
            "scale": {"optimizer": "adam", "rate": 7.5e-4, "schedule": "cosine"},
            "vector": {"optimizer": "adam", "rate": 2.5e-4, "schedule": "cosine"},
        },
    },
}
VARIANTS = FITS | {f"{name}{end}": FITS[name] | polish for name in FITS for end, polish in POLISH.items()}
FULL = "full precision"
DEFAULT = [
    f"{name}{end}"
    for name in ("rtn", "mse", "logit_mse", "hard_labels", "lfq", "lfq K=2", "lfq K=4")
    for end in ("", "+polish")
]


def main() -> None:
    """The parent starts a process for each grid and seed, and gathers what they have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grids", nargs="+", default=[*GRIDS][:4], choices=GRIDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=[FULL, *VARIANTS])
    parser.add_argument("--calibration", default="both", choices=KINDS)
    parser.add_argument("--text", type=Path, nargs="+", help="files of rows instead")
    parser.add_argument("--rows", type=int, default=512, help="of --calibration")
    parser.add_argument("--problems", type=int, default=0, help="of each of the five tasks, answered greedily")
    parser.add_argument("--harder", type=int, default=0, help="of each length, longer than the model was made for")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys of every variant, as key=value")
    parser.add_argument(
        "--each",
        help="a recipe key and its values, as key=value,value: every variant with each of them; rates=.5,2 "
        "are what the method's own rates are multiplied by, rates_last=.5,2 those of the final blocks",
    )
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.text:
        given.calibration = "own text"
    if given.only:
        work(given)
        return
    each_grid_and_seed(given)


def work(given: argparse.Namespace) -> None:
    """One grid and seed: every variant, quantized and measured."""
    sys.path.insert(0, str(given.eval))
    from cot_rows import rows as cot_rows

    source = open_source(given.model)
    tokenizer = source.tokenizer()
    train = None
    if given.text:
        train = own_text.read(given.text)
        given.rows = len(train)
    elif given.calibration in ("both", "solutions", "chat"):
        train = as_rows(cot_rows(tokenizer, given.rows, 1, kind=given.calibration))
    skeleton = Skeleton(source, torch.device(given.device), torch.float32)
    measuring = Measuring(skeleton, source, cot_tests(tokenizer))
    (grid,), (seed,) = given.grids, given.seeds
    common = {"steps": 300, "rows": given.rows, "row_tokens": 256, "held_out": 16, "batch": 8, "scale_dtype": "float32"}
    machine = {"device": given.device, "compute_dtype": "float32", "seed": seed}
    base = {**common, **GRIDS[grid], **machine, **parse_settings(given.set)}
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        run, out = Path(temporary) / "run", Path(temporary) / "out"
        if train is None:
            base["calibration"] = calibration(given, Path(temporary) / "prompts.txt")
        asked = problems.usual(given.problems) + problems.harder(given.harder)
        for (each, more), name in itertools.product(of_each(given.each, base), given.variants):
            began = time.monotonic()
            row: dict[str, Any] = {"grid": grid, "seed": seed, "variant": each + name, "calibration": given.calibration}
            row |= {"settings": given.set, "fitted_by": name}
            made = source
            if name != FULL:
                recipe = logitwise.Recipe.load(None, **{**base, **more, **VARIANTS[name]})
                result = logitwise.quantize(
                    given.model, out, recipe, rows=train, run_folder=run, keep_run=True, overwrite=True
                )
                made = open_source(out)
                row |= {"fitted_by": result.fitted_by, "held_out_kl": result.held_out_kl}
                row |= {"bits_per_weight": result.report["bits_per_weight"]}
                row |= {"polish": result.report["polish"] and result.report["polish"]["held_out"]}
            empty()  # other processes may need what this fit had
            figures = measuring(made)
            row |= {"figures": figures, "accuracy": problems.accuracy(made, skeleton.device, asked) if asked else None}
            found.append({**row, "seconds": round(time.monotonic() - began, 1)})
            save(given.only, found)
            right = " ".join(f"{kind} {sum(each) / len(each):.3f}" for kind, each in (row["accuracy"] or {}).items())
            print(f"{grid} seed {seed} {each}{name} ({found[-1]['seconds']} s): {kl_line(figures)} {right}", flush=True)


def of_each(asked: str | None, base: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What `--each` means: how a variant's name begins, and its settings."""
    if asked is None:
        return [("", {})]
    key, _, values = asked.partition("=")
    table = {"rates": "learning", "rates_last": "learning_last"}.get(key)
    if table is None:
        return [(f"{key}={value}: ", parse_settings([f"{key}={value}"])) for value in values.split(",")]
    recipe = logitwise.Recipe.load(None, **base)
    own = {role: recipe.learning_of(role).model_dump() for role in roles_of(recipe)}
    found = []
    for value in values.split(","):
        learning = {role: {**way, "rate": float(value) * way["rate"]} for role, way in own.items()}
        found.append((f"{key}={value}: ", {table: learning}))
    return found


def calibration(given: argparse.Namespace, prompts: Path) -> str:
    """What `--calibration` means to logitwise."""
    if given.calibration == "wikitext":
        return f"text:{given.eval / 'wikitext2_valid.txt'}"
    if given.calibration == "own":
        return "self"
    from cot_rows import pairs

    count = 8 * given.rows  # prompts enough for so many rows; their solutions are not looked at
    found = [prompt.replace("\n", " ") for prompt, _ in pairs(count, 1)]
    prompts.write_text("\n".join(found), encoding="utf-8")
    return f"self:{prompts}"


if __name__ == "__main__":
    main()
