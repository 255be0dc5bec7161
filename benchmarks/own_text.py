"""How far the model's own text carries: cot-22m at 2 bits, calibrated without a single given answer.

    python benchmarks/own_text.py --model DIR --eval DIR --rows-file rows.npz --make 24576      (writes the rows)
    python benchmarks/own_text.py --model DIR --eval DIR --rows-file rows.npz --out FILE --name NAME --set key=value ...

The rows are the model's own answers, sampled at temperature 1, to task prompts (seed 900,000, their solutions not
looked at), to the first 200 prompts of chat_valid.jsonl (their answers not looked at) and to prompts that ship with
logitwise. Measured on `rows(tokenizer, 64, 2000)` and `final_rows` of eval/cot_rows.py and on problems of the five
tasks, by the checkpoint as it is read back from disk.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import Measuring, cot_tests, kl_line
from problems import accuracy, usual
from processes import about, save

import logitwise
from logitwise.calibration.generate import write_answers
from logitwise.calibration.prompts import shipped_prompts
from logitwise.calibration.rows import Rows, pack
from logitwise.recipe import parse_settings
from logitwise.skeleton import Skeleton, load_whole
from logitwise.source import Source, open_source

ANSWER_TOKENS = 320
TOKENS_A_PROMPT = 150  # fewer than a prompt and its answer have in the mean, so that prompts do not run out


def main() -> None:
    """Writes the rows, or quantizes on them and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--rows-file", type=Path, required=True)
    parser.add_argument("--make", type=int, help="write so many rows and end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--problems", type=int, default=200, help="of each of the five tasks, answered greedily")
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys, as key=value")
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
        prompts(given.eval, tokens // TOKENS_A_PROMPT),
        tokens=tokens,
        answer_tokens=ANSWER_TOKENS,
        batch=6144 if given.device.startswith("cuda") else 64,
        seed=0,
    )
    rows = pack(documents, tokenizer.bos_token_id, 256)[: given.make]
    seconds = time.monotonic() - began
    text = torch.cat([rows.ids.flatten(), rows.following[-1, -1:]]).to(torch.int16)  # rows follow on each other
    np.savez(given.rows_file, text=text.numpy(), counts=np.packbits(rows.weights.numpy() > 0))
    print(f"{len(rows)} rows, {rows.counted():,} tokens counted, {rows.ids.numel() / seconds:,.0f} tokens/s")


def read(file: Path) -> Rows:
    """The rows that `write` wrote."""
    found = np.load(file)
    text = torch.from_numpy(found["text"]).long()
    counts = torch.from_numpy(np.unpackbits(found["counts"])).float()
    return Rows(text[:-1].view(-1, 256), text[1:].view(-1, 256), counts.view(-1, 256))


def prompts(folder: Path, count: int) -> list[str]:
    """Half task prompts, a quarter the chats' again and again, a quarter shipped."""
    from cot_tasks import TASKS, make

    found = [problem.prompt for task in TASKS for problem in make(task, 900_000, count // 2 // len(TASKS))]
    lines = (folder / "chat_valid.jsonl").read_text("utf-8").splitlines()[:200]
    chats = [json.loads(line)["prompt"] for line in lines]
    found += chats * (count // 4 // len(chats) + 1) + shipped_prompts(count // 4 + 1, 0)
    random.Random(0).shuffle(found)
    return found


def quantize(source: Source, given: argparse.Namespace) -> None:
    """One recipe, from the rows to its figures."""
    own = read(given.rows_file)
    device = torch.device(given.device)
    base = {"bits": 2, "group_size": 64, "row_tokens": 256, "held_out": 64, "checks": 10}
    machine = {"device": given.device, "compute_dtype": "float32"}
    recipe = logitwise.Recipe.load(None, **{**base, **machine, **parse_settings(given.set)})
    most = max(recipe.rows, recipe.rows_last or 0, recipe.polish_rows or 0) + 64
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        torch.set_float32_matmul_precision("high")
        result = logitwise.quantize(given.model, out, recipe, rows=own[-most:], run_folder=Path(temporary) / "run")
        seconds = round(time.monotonic() - began, 1)
        torch.set_float32_matmul_precision("highest")
        made, skeleton = open_source(out), Skeleton(source, device, torch.float32)
        figures = Measuring(skeleton, source, cot_tests(source.tokenizer()))(made)
        right = accuracy(made, device, usual(given.problems)) if given.problems else {}
    row = {
        "grid": "w2g64",
        "seed": recipe.seed,
        "variant": given.name,
        "settings": given.set,
        "seconds": seconds,
        "fitted_by": result.fitted_by,
        "windows": result.report["windows"],
        "polish": result.report["polish"],
        "bits_per_weight": result.report["bits_per_weight"],
        "accuracy": right,
        "figures": figures,
    }
    save(given.out, {**about(given.device), "results": [row]})
    share = " ".join(f"{task} {sum(each) / len(each):.3f}" for task, each in right.items())
    first = result.report["windows"][-1]["held_out"][0][1]
    print(f"{given.name} ({seconds} s): {kl_line(figures)} | {share} | held out {first:.4f} to {result.held_out_kl}")


if __name__ == "__main__":
    main()
