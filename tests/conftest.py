"""What all tests need.

Where there is no GPU, Triton's kernels run in its interpreter, which must be asked for before triton is imported.
"""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=4, help="How often each kind of run is killed (test_kills.py).")


@pytest.fixture(scope="session", autouse=True)
def the_same_type_on_every_processor() -> Iterator[None]:
    """A test's figures are of float32 on a CPU, whether or not it has instructions for bfloat16."""
    from logitwise import machine  # not above: types are checked only of what is imported after this file

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machine, "multiplies_bfloat16", lambda: False)
        yield


@pytest.fixture(autouse=True)
def compiled_without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler cannot trace the checks of types, so what it compiles goes without them."""
    from logitwise import fit, fused  # not above: types are checked only of what is imported after this file

    checked = fused.compiled_weight

    def unchecked(quantizer: torch.nn.Module, *dtype: torch.dtype) -> Tensor:
        before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return checked(quantizer, *dtype)
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)

    monkeypatch.setattr(fused, "compiled_weight", unchecked)
    monkeypatch.setattr(fit, "compiled_weight", unchecked)
