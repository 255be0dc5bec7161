"""What the machine decides: device, computing type, versions; and a scope in which results repeat."""

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from warnings import catch_warnings, filterwarnings

import numpy as np
import torch

from logitwise.errors import RecipeError
from logitwise.recipe import Choice, Recipe

REPORTED = ("logitwise", "torch", "transformers", "tokenizers", "safetensors", "gguf")


def choose_machine(recipe: Recipe) -> dict[str, Choice]:
    """Device and computing type, with reasons.

    Errors: RecipeError where the device that is asked for is not there.
    """
    if recipe.device != "auto":
        device = Choice(recipe.device, "as asked")
    elif torch.cuda.is_available():
        device = Choice("cuda", f"{torch.cuda.get_device_name()} was found")
    else:
        device = Choice("cpu", "no GPU was found")
    try:
        torch.empty(1, device=device.value)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        if why.startswith("Expected one of"):  # torch's list has devices that nobody here means
            why = "it is none of cpu, cuda, cuda:1 (any number) and mps"
        raise RecipeError(f"device {device.value} cannot be used", why, "choose --device cpu, or auto") from error
    if recipe.compute_dtype != "auto":
        return {"device": device, "compute_dtype": Choice(recipe.compute_dtype, "as asked")}
    if torch.device(device.value).type == "cuda" and torch.cuda.is_bf16_supported():
        return {"device": device, "compute_dtype": Choice("bfloat16", "the GPU multiplies it at full rate")}
    if torch.device(device.value).type == "cpu" and multiplies_bfloat16():
        return {"device": device, "compute_dtype": Choice("bfloat16", "the processor has instructions for it")}
    return {"device": device, "compute_dtype": Choice("float32", f"on {device.value}")}


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: with AVX-512's or AMX's instructions for it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def versions() -> dict[str, str]:
    """Of Python, logitwise and the packages that decide results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in REPORTED}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # logitwise itself, run from its source folder


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside this context the same seed gives the same bits, whatever the caller has set.

    The caller's generators and torch's settings are left as they were.
    """
    gpus = range(torch.cuda.device_count())  # named, since torch warns of several that are not
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()  # libraries draw from both
    with torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad(), catch_warnings():
        filterwarnings("ignore", message="Attempting to run cuBLAS")  # on a thread's first product, which then runs
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling every new tensor would make the model's empty parameters real memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.set_default_dtype(dtype)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            random.setstate(drawn)
            np.random.set_state(drawn_by_numpy)
