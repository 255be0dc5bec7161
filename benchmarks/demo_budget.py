"""Which method, rate and number of steps suit the demo's budget: SmolLM2-135M-Instruct, W3 g64, its own text.

    python benchmarks/demo_budget.py --out results.json [--model FILE.gguf] [--device cuda] [--variants NAME ...]

Every variant sees the same calibration rows and is measured, as it is read back from disk, on the same answers to
other prompts. Computed in float32, so that a GPU gives the figures that the demo gives on a processor.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from logitwise import Recipe, quantize
from logitwise.demo import smollm2, unseen_rows
from logitwise.measure.likelihood import as_json, likelihood, outputs
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton
from logitwise.source import open_source


def flexround(rate: float, **more: object) -> dict[str, object]:
    learning = {"optimizer": "adam", "rate": rate, "schedule": "cosine"}
    return {"method": "flexround", "learning": {"scale": learning, "rounding": learning}, **more}


def signround(rate: float, **more: object) -> dict[str, object]:
    learning = {"optimizer": "sign_sgd", "rate": rate, "per": "fit", "schedule": "linear"}
    return {"method": "signround", "learning": {"rounding": learning, "range": learning}, **more}


OBJECTIVES = {"mse": {"objective": "mse"}, "lfq": {"objective": "lfq", "start_last": "start"}}
VARIANTS = {
    "rtn": {"method": "rtn", "learning": None},
    **{f"flexround {rate:g}": flexround(rate) for rate in (4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2)},
    **{f"signround {rate:g}": signround(rate) for rate in (0.5, 0.7, 1.0, 1.4, 2.0)},
    "signround 1, last 40 of 4": signround(1.0, steps_last=40, batch_last=4),
    "signround 1, last 120 of 2": signround(1.0, steps_last=120),
    "signround 1, last 120 of 4": signround(1.0, steps_last=120, batch_last=4),
    "signround 1, last 60 of 8": signround(1.0, batch_last=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    arguments = parser.parse_args()
    model = arguments.model or smollm2()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        run, source, device = Path(temporary) / "run", open_source(model), torch.device(arguments.device)
        demo = Recipe.load("demo", device=arguments.device, compute_dtype="float32")
        rows = unseen_rows(source, demo, RunFolder(run))
        skeleton = Skeleton(source, device, torch.float32)
        reference = outputs(skeleton, source, rows)
        for name in arguments.variants:
            for seed in arguments.seeds:
                recipe = demo.but(**{**VARIANTS[name], "seed": seed})
                for objective in ("mse",) if recipe.method == "rtn" else ("mse", "lfq"):
                    began, out = time.monotonic(), Path(temporary) / "out"
                    made = quantize(
                        model, out, recipe.but(**OBJECTIVES[objective]), run_folder=run, keep_run=True, overwrite=True
                    )
                    figures = as_json(likelihood(outputs(skeleton, open_source(out), rows), reference, rows))
                    seconds = round(time.monotonic() - began, 1)
                    found.append(
                        {
                            "variant": name,
                            "seed": seed,
                            "objective": objective,
                            "fitted_by": made.fitted_by,
                            "held_out_kl": made.held_out_kl,
                            "seconds": seconds,
                            **figures,
                        }
                    )
                    print(
                        f"{name:36} seed {seed} {objective}: KL {figures['kl']['mean']:.4f} "
                        f"± {figures['kl']['standard_error']:.4f} top-1 {figures['top1']['mean']:.4f} "
                        f"perplexity {figures['perplexity']['mean']:.2f} ({seconds} s) {made.held_out_kl}",
                        flush=True,
                    )
                    arguments.out.write_text(
                        json.dumps(
                            {"arguments": sys.argv[1:], "versions": made.report["versions"], "results": found}, indent=1
                        )
                    )


if __name__ == "__main__":
    main()
