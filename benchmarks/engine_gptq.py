"""Loads GPTQ and AWQ checkpoints by gptqmodel, through transformers, and compares log-probabilities with ours.

Run it with logitwise's Python; --python names that of an environment with gptqmodel and optimum, which want another
torch: torch==2.13.0; transformers optimum accelerate; then, without their dependencies, gptqmodel==7.7.0 defuser
device-smi logbar tokenicer torchao; then threadpoolctl protobuf pillow requests pypcre ninja datasets dill. A compiler
is needed, as gptqmodel builds its kernels for CPU when a model is first loaded. They compute in less than float32, so
that log-probabilities differ by some thousandths; the weights themselves are compared bit for bit in the tests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitwise.source import open_source

TOKENS = 64
GATE = 2e-2
"""The largest difference of a token's log-probability, in nats, that is not a failure."""

LOADED_THERE = """
import sys, json, time, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([json.loads(sys.argv[2])])
began = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map="cpu").eval()
loaded = time.monotonic() - began
with torch.no_grad():
    logits = model(input_ids=ids).logits[0, :-1].float()
kernels = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
found = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()
json.dump({"seconds": round(loaded, 1), "kernels": kernels, "found": found}, open(sys.argv[3], "w"))
"""


def main() -> None:
    """Prints one line of JSON for each checkpoint; exit code 1 where one differs by more than the gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that holds gptqmodel")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    given = parser.parse_args()
    passed = True
    for checkpoint in given.checkpoints:
        result = compared(given.python, checkpoint)
        passed = passed and result.get("largest", 1.0) <= GATE
        print(json.dumps({"checkpoint": checkpoint.name, **result}), flush=True)
    sys.exit(not passed)


def compared(python: Path, checkpoint: Path) -> dict[str, Any]:
    """What the engine gives beside our own reading in float32, teacher-forced on the same tokens."""
    config = AutoConfig.from_pretrained(checkpoint)
    ids = torch.randint(config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    ours = log_probabilities(checkpoint, ids)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        words = [str(checkpoint.resolve()), json.dumps(ids.tolist()), str(answer)]
        ran = subprocess.run([python, "-c", LOADED_THERE, *words], capture_output=True, text=True)
        if ran.returncode:
            return {"failed": ran.stderr.strip().splitlines()[-1]}
        there = json.loads(answer.read_text())
    difference = (torch.tensor(there.pop("found")) - ours).abs()
    return {
        **there,
        "tokens": TOKENS - 1,
        "largest": round(float(difference.max()), 5),
        "mean": round(float(difference.mean()), 5),
        "nll_ours": round(-float(ours.mean()), 4),
    }


def log_probabilities(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of each token after the first, by a dense model in float32 of the weights that logitwise reads."""
    source = open_source(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({name: source.read(name).float() for name in source.names()}, strict=False)
    with torch.no_grad():
        logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[1:].unsqueeze(-1)).squeeze(-1)


if __name__ == "__main__":
    main()
