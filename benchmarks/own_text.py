"""How far the model's own text carries: cot-22m at 2 bits, calibrated without a single given answer.

    python benchmarks/own_text.py --model DIR --eval DIR --make 16384 --text rows.npz [--seed 1]
    python benchmarks/own_text.py --model DIR --eval DIR --text rows.npz [more.npz] --out FILE [--variants NAME ...]

The first writes rows: the model's own answers, sampled at temperature 1, to task prompts (seed 900,000, their solutions
not looked at), to the first 200 prompts of chat_valid.jsonl (their answers not looked at) and to prompts that ship with
logitwise. The second fits every block by MSE, then all of them together by LFQ, one factor at a time other than in
`USUAL`. Measured on `rows(tokenizer, 64, 2000)` and `final_rows` of eval/cot_rows.py and on problems of the five tasks,
by the checkpoints as they are read back from disk.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Measuring, cot_tests, kl_line
from problems import accuracy, usual
from processes import about, empty, save

import logitwise
from logitwise.calibration.generate import write_answers
from logitwise.calibration.prompts import shipped_prompts
from logitwise.calibration.rows import Rows, pack
from logitwise.recipe import parse_settings
from logitwise.skeleton import Skeleton, load_whole
from logitwise.source import Source, open_source

ANSWER_TOKENS = 320
TOKENS_A_PROMPT = 150  # fewer than a prompt and its answer have in the mean, so that prompts do not run out
HELD_OUT = 64


def rates(rounding: float, scale: float = 1e-3) -> dict[str, Any]:
    """`learning_last` with these rates."""
    adam = {"optimizer": "adam", "schedule": "cosine"}
    return {"learning_last": {"scale": {**adam, "rate": scale}, "rounding": {**adam, "rate": rounding}}}


USUAL: dict[str, Any] = {
    **{"bits": 2, "group_size": 64, "row_tokens": 256, "held_out": HELD_OUT, "checks": 10},
    **{"rows": 512, "steps": 300, "batch": 8},
    **{"rows_last": 16300, "steps_last": 1200, "batch_last": 32, **rates(4e-3)},
    **{"final_blocks": 12},
}
POLISHED: dict[str, Any] = {"polish": True, "polish_batch": 32}
FACTORS: dict[str, list[Any]] = {
    "rows_last": [128, 512, 2048, 8192, 32600],
    "steps_last": [300, 4000],
    "final_blocks": [1, 2, 4, 8],
    "steps": [100, 1200],  # of the MSE fits that all starts from
}
MSE: dict[str, Any] = {"objective": "mse", "final_blocks": 1, "learning_last": None}
ALIKE: dict[str, Any] = {"rows_last": None, "steps_last": None, "batch_last": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "mse": {**MSE, **ALIKE},
    "mse, all text": {**MSE, **ALIKE, "rows": 16300, "steps": 1200, "batch": 32},
    "usual": {},
    **{f"{key}={value}": {key: value} for key, values in FACTORS.items() for value in values},
    **{f"rate={rate}": rates(rate) for rate in (1e-3, 2e-3, 8e-3)},
    "usual+polish": POLISHED,
    "steps_last=4000+polish": {**POLISHED, "steps_last": 4000},
    "steps_last=4000 rows_last=32600+polish": {**POLISHED, "steps_last": 4000, "rows_last": 32600},
}


def main() -> None:
    """Writes the rows, or quantizes on them and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="files of rows; the last of all are held out"
    )
    parser.add_argument("--make", type=int, help="write so many rows and end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", nargs="+", default=["mse", "usual"], choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--problems", type=int, default=200, help="of each of the five tasks, answered greedily")
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys of every variant, as key=value")
    given = parser.parse_args()
    sys.path.insert(0, str(given.eval))
    source = open_source(given.model)
    if given.make:
        write(source, given)
    else:
        quantize(source, given)


def write(source: Source, given: argparse.Namespace) -> None:
    """Rows of the model's own text."""
    tokenizer = source.tokenizer()
    assert len(tokenizer) < 1 << 15, "ids are stored in 16 bits"
    tokens = (given.make + 1) * 256
    began = time.monotonic()
    documents = write_answers(
        load_whole(source, torch.device(given.device), torch.float32),
        tokenizer,
        prompts(given.eval, tokens // TOKENS_A_PROMPT, given.seed),
        tokens=tokens,
        answer_tokens=ANSWER_TOKENS,
        batch=6144 if given.device.startswith("cuda") else 64,
        seed=given.seed,
    )
    rows = pack(documents, tokenizer.bos_token_id, 256)[: given.make]
    seconds = time.monotonic() - began
    text = torch.cat([rows.ids.flatten(), rows.following[-1, -1:]]).to(torch.int16)  # rows follow on each other
    np.savez_compressed(given.text[0], text=text.numpy(), counts=np.packbits(rows.weights.numpy() > 0))
    print(f"{len(rows)} rows, {rows.counted():,} tokens counted, {rows.ids.numel() / seconds:,.0f} tokens/s")


def read(files: list[Path]) -> Rows:
    """The rows that `write` wrote; those of the first file last, so that the same ones are held out with more files."""
    parts = []
    for file in reversed(files):
        found = np.load(file)
        text = torch.from_numpy(found["text"]).long()
        counts = torch.from_numpy(np.unpackbits(found["counts"])).float()
        parts.append(Rows(text[:-1].view(-1, 256), text[1:].view(-1, 256), counts.view(-1, 256)))
    return Rows.join(parts)


def prompts(folder: Path, count: int, seed: int) -> list[str]:
    """Half task prompts, a quarter the chats' again and again, a quarter shipped."""
    from cot_tasks import TASKS, make

    found = [problem.prompt for task in TASKS for problem in make(task, 900_000 + seed, count // 2 // len(TASKS))]
    lines = (folder / "chat_valid.jsonl").read_text("utf-8").splitlines()[:200]
    chats = [json.loads(line)["prompt"] for line in lines]
    found += chats * (count // 4 // len(chats) + 1) + shipped_prompts(count // 4 + 1, seed)
    random.Random(seed).shuffle(found)
    return found


def quantize(source: Source, given: argparse.Namespace) -> None:
    """Every variant, from the rows to its figures; they share the fits that they have in common."""
    own, device = read(given.text), torch.device(given.device)
    measuring = Measuring(Skeleton(source, device, torch.float32), source, cot_tests(source.tokenizer()))
    machine = {"device": given.device, "compute_dtype": "bfloat16", "seed": given.seed}
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        out, run = Path(temporary) / "out", Path(temporary) / "run"
        for name in given.variants:
            recipe = logitwise.Recipe.load(None, **{**USUAL, **machine, **VARIANTS[name], **parse_settings(given.set)})
            most = max(recipe.rows, recipe.rows_last or 0)
            rows = Rows.join([own[:most], own[-HELD_OUT:]])
            assert most <= len(own) - HELD_OUT, f"{name} needs {most + HELD_OUT} rows: give more --text"
            began = time.monotonic()
            torch.set_float32_matmul_precision("high")
            result = logitwise.quantize(
                given.model, out, recipe, rows=rows, run_folder=run, keep_run=True, overwrite=True
            )
            seconds = round(time.monotonic() - began, 1)
            torch.set_float32_matmul_precision("highest")
            made = open_source(out)
            empty()  # other processes may need what this fit had
            figures = measuring(made)
            right = accuracy(made, device, usual(given.problems)) if given.problems else {}
            row = {
                "grid": "w2g64",
                "seed": given.seed,
                "variant": name,
                "settings": given.set,
                "seconds": seconds,
                "fitted_by": result.fitted_by,
                "held_out_kl": result.held_out_kl,
                "windows": [without_losses(window) for window in result.report["windows"]],
                "polish": result.report["polish"] and without_losses(result.report["polish"]),
                "bits_per_weight": result.report["bits_per_weight"],
                "accuracy": right,
                "figures": figures,
            }
            found.append(row)
            save(given.out, {**about(given.device), "results": found})
            share = " ".join(f"{task} {sum(each) / len(each):.3f}" for task, each in right.items())
            kl = {objective: round(value, 4) for objective, value in result.held_out_kl.items()}
            print(f"{name} ({seconds} s): {kl_line(figures)} | {share} | held out {kl}", flush=True)


def without_losses(record: dict[str, Any]) -> dict[str, Any]:
    """A fit's figures without the loss of every step."""
    return {name: value for name, value in record.items() if name != "losses"}


if __name__ == "__main__":
    main()
