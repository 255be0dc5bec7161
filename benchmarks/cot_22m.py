"""LFQ against MSE on cot-22m: held-out KL by grid, objective and seed.

    python benchmarks/cot_22m.py --model DIR --eval DIR --out results.json [--device cuda] [--grids w2g64 w2ch w3ch]

The calibration rows are `rows(tokenizer, 512, 1)` of eval/cot_rows.py, the figures are measured on
`rows(tokenizer, 64, 2000)`, both by the checkpoints as they are read back from disk.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

import logitwise
from logitwise.calibration.rows import Rows
from logitwise.measure.likelihood import as_json, likelihood, outputs
from logitwise.recipe import parse_settings
from logitwise.skeleton import Skeleton
from logitwise.source import open_source

GRIDS = {
    "w2g64": {"bits": 2, "group_size": 64},
    "w2ch": {"bits": 2, "group_size": None},
    "w3ch": {"bits": 3, "group_size": None},
    "w3g64": {"bits": 3, "group_size": 64},
    "w4g64": {"bits": 4, "group_size": 64},
}
OBJECTIVES = {"mse": {"objective": "mse"}, "lfq": {"objective": "lfq", "start_last": "start"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--grids", nargs="+", default=["w2g64", "w2ch", "w3ch"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.eval))
    from cot_rows import rows as cot_rows

    source = open_source(arguments.model)
    tokenizer = source.tokenizer()

    def as_rows(count: int, seed: int) -> Rows:
        ids, mask, following = cot_rows(tokenizer, count, seed)
        return Rows(ids, following, mask.float())

    train, test = as_rows(arguments.rows, 1), as_rows(64, 2000)
    device = torch.device("cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu")
    skeleton = Skeleton(source, device, torch.float32)
    reference = outputs(skeleton, source, test, batch=64)
    extra = parse_settings(arguments.set)
    found = []
    for grid in arguments.grids:
        for seed in arguments.seeds:
            recipe = logitwise.Recipe.load(
                None,
                **{
                    **GRIDS[grid],
                    "steps": arguments.steps,
                    "rows": 512,
                    "row_tokens": 256,
                    "batch": 8,
                    "seed": seed,
                    "scale_dtype": "float32",
                    "device": str(device),
                    "compute_dtype": "float32",
                    **extra,
                },
            )
            with tempfile.TemporaryDirectory() as temporary:
                run = Path(temporary) / "run"
                for objective, settings in OBJECTIVES.items():
                    began = time.monotonic()
                    out = Path(temporary) / objective
                    result = logitwise.quantize(
                        arguments.model, out, recipe.but(**settings), rows=train, run_folder=run, keep_run=True
                    )
                    made = open_source(out)
                    figures = as_json(likelihood(outputs(skeleton, made, test, batch=64), reference, test))
                    row = {
                        "grid": grid,
                        "seed": seed,
                        "objective": objective,
                        "fitted_by": result.fitted_by,
                        "held_out_kl": result.held_out_kl,
                        "bits_per_weight": result.report["bits_per_weight"],
                        "seconds": round(time.monotonic() - began, 1),
                        **figures,
                    }
                    found.append(row)
                    print(
                        f"{grid:6} seed {seed} {objective}: KL {figures['kl']['mean']:.4f} top-1 "
                        f"{figures['top1']['mean']:.4f} ({row['seconds']} s) {result.held_out_kl}",
                        flush=True,
                    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    arguments.out.write_text(
        json.dumps(
            {"device": name, "versions": result.report["versions"], "arguments": sys.argv[1:], "results": found},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
