"""A quantizer's weight in a few kernels instead of dozens: what a method writes operation by operation, compiled.

On a GPU the operations of a small weight are bound by their launches and those of a large one by memory; compiled, each
value is read and written once. torch's compiler takes half a minute before the first step, so short runs go without.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from logitwise.quantizers import Quantizer

SECONDS_A_MATRIX = 2.3e-5
"""What it saves a step for a small matrix: the seven of cot-22m's recorded block take .16 ms less on an H100."""

SECONDS_A_WEIGHT = 5e-11
"""What it saves a step for a weight of a large one: the 218 million of Llama-3.1-8B's block take 11.1 ms less."""

SECONDS_TO_COMPILE = 25
"""A method's weights of four shapes, forward and backward, with 16 cores."""

SHAPES = 256
"""Weights of so many shapes and settings are compiled before torch gives up on a method; its own limit is 8."""


def pays(matrices: int, weights: int) -> bool:
    """Whether a run that takes so many steps of a matrix, and of a weight, in all is faster compiled, on a GPU."""
    saved = SECONDS_A_MATRIX * matrices + SECONDS_A_WEIGHT * weights
    return saved > SECONDS_TO_COMPILE and find_spec("triton") is not None


def compiled_weight(quantizer: Quantizer, dtype: torch.dtype = torch.float32) -> Tensor:
    """`quantizer(0.0)` in a type, compiled once for each method, grid, type and shape of weight."""
    with torch._dynamo.config.patch(recompile_limit=SHAPES), warnings.catch_warnings():
        # Matrices are multiplied here as elsewhere, in full float32.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        return _compiled()(quantizer, dtype)


@cache
def _compiled() -> Callable[[Quantizer, torch.dtype], Tensor]:
    return torch.compile(lambda quantizer, dtype: quantizer(0.0).to(dtype), dynamic=False)
