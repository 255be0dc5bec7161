"""What AutoRound's hard labels do, part by part: cot-22m at W2 g64, SignRound, the last block fitted in several ways.

    python benchmarks/hard_labels.py --model DIR --eval DIR --out results.json [--seeds 0 1 2]

As AutoRound 0.16.1 does with `enable_lfq`: 200 steps of 8 rows at 1 / 200 falling to 0, the min-max start, float16
scales, next-token labels over all positions, the iterate of the least mini-batch loss. Variants take parts of it away.
Blocks 1 to 11 are shared, their iterates chosen on 16 held-out rows. Measured as benchmarks/lfq_variants.py does.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import logitwise
from logitwise.calibration.rows import Rows
from logitwise.machine import versions
from logitwise.measure.likelihood import as_json, likelihood, outputs
from logitwise.skeleton import Skeleton
from logitwise.source import open_source

HARD: dict[str, Any] = {"objective": "hard_labels"}
PROMPTS: dict[str, Any] = {"objective_settings": {"prompts": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "mse, held-out rows choose": {"objective": "mse"},
    "hard labels, prompts too, least batch (AutoRound)": {**HARD, **PROMPTS, "choose_last": "batch"},
    "hard labels, prompts too, last iterate": {**HARD, **PROMPTS, "choose_last": "last"},
    "hard labels, answers alone, last iterate": {**HARD, "choose_last": "last"},
    "soft targets, least batch": {"choose_last": "batch"},
    "soft targets, last iterate": {"choose_last": "last"},
    "soft targets, held-out rows choose (LFQ)": {},
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
    from cot_rows import final_rows
    from cot_rows import rows as cot_rows

    source = open_source(given.model)
    tokenizer = source.tokenizer()

    def as_rows(made: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Rows:
        ids, mask, following = made
        return Rows(ids, following, mask.float())

    train = as_rows(cot_rows(tokenizer, 512, 1))
    tests = {"development": as_rows(cot_rows(tokenizer, 64, 2000))}
    tests |= {f"final {kind}": as_rows(final_rows(tokenizer, kind)) for kind in ("both", "solutions", "chat")}
    skeleton = Skeleton(source, torch.device(given.device), torch.float32)
    references = {name: outputs(skeleton, source, rows, batch=32) for name, rows in tests.items()}
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
                made, figures = open_source(out), {}
                for where, rows in tests.items():
                    measured = likelihood(outputs(skeleton, made, rows, batch=32), references[where], rows)
                    figures[where] = {**as_json(measured), "kl_by_row": measured.kl_by_row.tolist()}
                last = result.report["windows"][-1]
                row = {"grid": "w2g64", "seed": seed, "variant": name, "fitted_by": result.fitted_by}
                found.append({**row, "held_out_kl": result.held_out_kl, "kept": last["kept"], "figures": figures})
                kl = " ".join(f"{where} {figure['kl']['mean']:.4f}" for where, figure in figures.items())
                print(f"seed {seed} {name}, step {last['kept']} kept: {kl}", flush=True)
                device = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
                about = {"device": device, "versions": versions(), "arguments": sys.argv[1:]}
                given.out.write_text(json.dumps({**about, "results": found}))


if __name__ == "__main__":
    main()
