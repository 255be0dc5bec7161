"""What AutoRound's hard labels do, part by part: cot-22m at W2 g64, SignRound, the last block fitted in several ways.

    python benchmarks/hard_labels.py --model DIR --eval DIR --out results.json [--seeds 0 1 2]

As AutoRound 0.16.1 does with `enable_lfq`: 200 steps of 8 rows at 1 / 200 falling to 0, the min-max start, float16
scales, next-token labels over all positions, the iterate of the least mini-batch loss. Variants take parts of it away.
Blocks 1 to 11 are shared, their iterates chosen on 16 held-out rows. Measured as benchmarks/lfq_variants.py does.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import Measuring, as_rows, cot_tests, kl_line
from processes import about, save

import logitwise
from logitwise.skeleton import Skeleton
from logitwise.source import open_source

SOFT: dict[str, Any] = {"objective": "lfq", "start_last": "start"}
HARD: dict[str, Any] = {"objective": "hard_labels", "start_last": "start"}
PROMPTS: dict[str, Any] = {"objective_settings": {"prompts": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "mse, held-out rows choose": {"objective": "mse"},
    "hard labels, prompts too, least batch (AutoRound)": {**HARD, **PROMPTS, "choose_last": "batch"},
    "hard labels, prompts too, last iterate": {**HARD, **PROMPTS, "choose_last": "last"},
    "hard labels, answers alone, last iterate": {**HARD, "choose_last": "last"},
    "soft targets, least batch": {**SOFT, "choose_last": "batch"},
    "soft targets, last iterate": {**SOFT, "choose_last": "last"},
    "soft targets, held-out rows choose (LFQ)": SOFT,
}


def main() -> None:
    """Prints a line for each variant and seed; JSON in --out after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    sys.path.insert(0, str(given.eval))
    from cot_rows import rows as cot_rows

    source = open_source(given.model)
    tokenizer = source.tokenizer()
    train = as_rows(cot_rows(tokenizer, 512, 1))
    measuring = Measuring(Skeleton(source, torch.device(given.device), torch.float32), source, cot_tests(tokenizer))
    base = {"bits": 2, "method": "signround", "start": "minmax", "steps": given.steps, "batch": 8, "rows": 512}
    base |= {"row_tokens": 256, "held_out": 16, "checks": 5, "device": given.device, "compute_dtype": "float32"}
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in given.seeds:
            for name, settings in VARIANTS.items():
                recipe = logitwise.Recipe.load(None, **{**base, **settings, "seed": seed})
                out, run = Path(temporary) / "out", Path(temporary) / f"run{seed}"
                result = logitwise.quantize(
                    given.model, out, recipe, rows=train, run_folder=run, keep_run=True, overwrite=True
                )
                figures = measuring(open_source(out))
                last = result.report["windows"][-1]
                row = {"grid": "w2g64", "seed": seed, "variant": name, "fitted_by": result.fitted_by}
                found.append({**row, "held_out_kl": result.held_out_kl, "kept": last["kept"], "figures": figures})
                print(f"seed {seed} {name}, step {last['kept']} kept: {kl_line(figures)}", flush=True)
                save(given.out, {**about(given.device), "results": found})


if __name__ == "__main__":
    main()
