"""Checkpoints of other tools to refit, made on the calibration rows that ours have.

    PYTHON benchmarks/make_others.py autoround --model DIR --eval DIR --out DIR [--grids w2g64 ...] [--rows-seeds 1 2 3]
    PYTHON benchmarks/make_others.py gptqmodel|llmcompressor|autoawq --model DIR --eval DIR --out DIR

PYTHON is that of the tool's own environment, which needs no logitwise; torch==2.13.0 first, then, with that version
held by a constraints file, auto-round==0.16.1 (and compressed-tensors for --format llm_compressor), or
llmcompressor==0.14.0.1; for AutoAWQ `transformers<4.52` accelerate datasets and, without what it asks for,
autoawq==0.2.9. GPTQModel's is `make .venv-gptqmodel/.made`. Every checkpoint is a folder OUT/TOOL_GRID_rowsSEED; those
that are there stay. Rows are `rows(tokenizer, 512, SEED)` of eval/cot_rows.py, of 256 tokens, all of them seen whole (a
mask of ones).

AutoRound: 200 steps of 8 rows a block, else its defaults: symmetric, with scales of either sign, in float16.
GPTQModel: its defaults but for asymmetric grids, which 2 bits need. llm-compressor: GPTQ, in asymmetric grids too.
AutoAWQ: its defaults (asymmetric, clipped), 4 bits alone.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

GRIDS = {"w2g64": (2, 64), "w3g64": (3, 64), "w4g64": (4, 64)}
AUTOROUND_FORMATS = ("auto_round", "auto_round:gptqmodel", "auto_round:auto_awq", "auto_gptq", "auto_awq")
AUTOROUND_FORMATS += ("llm_compressor", "mlx")


def main() -> None:
    """Makes what is not there yet, one after another, and says how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=MAKERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grids", nargs="+", default=[*GRIDS], choices=GRIDS)
    parser.add_argument("--rows-seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200, help="AutoRound's, of each block")
    parser.add_argument("--asymmetric", action="store_true", help="AutoRound's grids; the others' always are")
    parser.add_argument("--format", default="auto_round", help=f"AutoRound's: {', '.join(AUTOROUND_FORMATS)}")
    given = parser.parse_args()
    for seed in given.rows_seeds:
        for grid in given.grids:
            out = given.out / f"{given.tool}_{grid}_rows{seed}"
            if out.exists():
                continue
            began, unfinished = time.monotonic(), out.with_name(f"{out.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            MAKERS[given.tool](given, *GRIDS[grid], calibration_rows(given, seed), unfinished)
            made = {"tool": given.tool, "grid": grid, "rows_seed": seed, "rows": given.rows}
            made |= {"seconds": round(time.monotonic() - began, 1), "threads": torch.get_num_threads()}
            unfinished.rename(out)
            (given.out / f"{out.name}.json").write_text(json.dumps(made))
            print(json.dumps(made), flush=True)


def calibration_rows(given: argparse.Namespace, seed: int) -> torch.Tensor:
    """Token ids [rows, 256]."""
    sys.path.insert(0, str(given.eval))
    from cot_rows import rows

    ids: torch.Tensor = rows(PreTrainedTokenizerFast.from_pretrained(given.model), given.rows, seed)[0]
    return ids


def by_autoround(given: argparse.Namespace, bits: int, group_size: int, ids: torch.Tensor, out: Path) -> None:
    """Writes AutoRound's checkpoint: batches of 8 rows come with a mask, since it would take separators for padding."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    tool = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group_size,
        sym=not given.asymmetric,
        iters=given.steps,
        batch_size=8,
        seqlen=ids.shape[1],
        nsamples=len(ids),
        dataset=batches,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    place = out.with_name(f"{out.name}.parts")  # it may put the files into a folder of its own within
    tool.quantize_and_save(str(place), format=given.format)
    (config,) = place.rglob("config.json")
    config.parent.rename(out)
    shutil.rmtree(place, ignore_errors=True)


def by_gptqmodel(given: argparse.Namespace, bits: int, group_size: int, ids: torch.Tensor, out: Path) -> None:
    """Writes GPTQModel's checkpoint."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    device: dict[str, Any] = {} if torch.cuda.is_available() else {"device": "cpu"}
    model = GPTQModel.load(str(given.model), QuantizeConfig(bits=bits, group_size=group_size, sym=False, **device))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    model.quantize(rows, batch_size=8, calibration_sort=None)
    model.save(str(out))


def by_llmcompressor(given: argparse.Namespace, bits: int, group_size: int, ids: torch.Tensor, out: Path) -> None:
    """Writes llm-compressor's checkpoint, by GPTQ."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(given.model),
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups=scheme, ignore=["lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )


def by_autoawq(given: argparse.Namespace, bits: int, group_size: int, ids: torch.Tensor, out: Path) -> None:
    """Writes AutoAWQ's checkpoint."""
    from awq import AutoAWQForCausalLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)  # its transformers has no newer classes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoAWQForCausalLM.from_pretrained(str(given.model), device_map=device, torch_dtype=torch.float32)
    model.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": group_size, "w_bit": bits, "version": "GEMM"},
        calib_data=ids.tolist(),
        max_calib_samples=len(ids),
        max_calib_seq_len=ids.shape[1],
        n_parallel_calib_samples=64,
    )
    model.save_quantized(str(out))
    tokenizer.save_pretrained(out)


MAKERS = {
    "autoround": by_autoround,
    "gptqmodel": by_gptqmodel,
    "llmcompressor": by_llmcompressor,
    "autoawq": by_autoawq,
}

if __name__ == "__main__":
    main()
