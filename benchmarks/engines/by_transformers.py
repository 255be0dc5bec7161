"""transformers in float32: compressed-tensors and GGUF; with gptqmodel and optimum beside it GPTQ and AWQ.

    python by_transformers.py PACKAGE ...

The packages are those whose versions are told.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel's products for one text are not worth compiling

import torch
from answering import answer_all, by_logits
from transformers import AutoModelForCausalLM


class Loaded:
    """A checkpoint by plain `from_pretrained`."""

    def __init__(self, path: str) -> None:
        file = Path(path)
        words = {"gguf_file": file.name} if file.is_file() else {"device_map": "cpu"}
        folder = file.parent if file.is_file() else file
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **words).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Any:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


if __name__ == "__main__":
    answer_all(by_logits(Loaded), sys.argv[1:])
