"""A quantizer's weight in a few kernels instead of dozens: what a method writes as element-wise operations, compiled.

On a GPU the operations of a small weight are bound by their launches and those of a large one by memory; compiled, each
value is read and written once.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from logitwise.quantizers import Quantizer

AS_EAGER = ("emulate_precision_casts", "eager_numerics.division_rounding")
"""Options of torch's compiler without which a stored scale would keep the bits that its type has not, for one."""

SHAPES = 256
"""Weights of so many shapes and settings are compiled before torch gives up on a method; its own limit is 8."""


def learned_weight(quantizer: Quantizer, progress: float) -> Tensor:
    """`quantizer(progress)`, compiled where that pays: on CUDA, for methods that do not read how far the fit is."""
    on_gpu = next(quantizer.parameters()).is_cuda and find_spec("triton") is not None
    if quantizer.reads_progress or not on_gpu:
        weight: Tensor = quantizer(progress)
        return weight
    return compiled_weight(quantizer)


def compiled_weight(quantizer: Quantizer) -> Tensor:
    """`quantizer(0.0)`, compiled once for each method, grid and shape of weight."""
    with torch._dynamo.config.patch(recompile_limit=SHAPES), warnings.catch_warnings():
        # Nothing here multiplies matrices.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        return _compiled()(quantizer)


@cache
def _compiled() -> Callable[[Quantizer], Tensor]:
    import torch._inductor  # seconds, which only those who compile should wait

    known = torch._inductor.list_options()
    options: dict[str, str | int | bool] = {name: True for name in AS_EAGER if name in known}
    return torch.compile(lambda quantizer: quantizer(0.0), dynamic=False, options=options)
