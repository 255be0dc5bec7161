"""mlx-lm on a CPU, activations in float32; codes stay as they are."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from answering import answer_all, by_logits
from mlx_lm.utils import load_model


class Loaded:
    """A checkpoint by mlx-lm's own loader."""

    def __init__(self, path: str) -> None:
        self.model, _ = load_model(Path(path))
        self.model.set_dtype(mx.float32)

    def logits(self, ids: list[int]) -> Any:
        return np.array(self.model(mx.array([ids]))[0].astype(mx.float32))


if __name__ == "__main__":
    answer_all(by_logits(Loaded), ["mlx", "mlx-lm"])
