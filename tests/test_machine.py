"""What is chosen for the machine, and that bfloat16 on a CPU costs the logits nothing."""

import pytest
import torch
from helpers import MemorySource, tiny_model

from logitwise import machine
from logitwise.machine import choose_machine
from logitwise.recipe import Recipe
from logitwise.skeleton import Skeleton


@pytest.mark.parametrize(("has", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_processor_computes_in_what_it_multiplies_fast(
    has: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: has)
    assert choose_machine(Recipe(device="cpu"))["compute_dtype"].value == dtype
    assert choose_machine(Recipe(device="cpu", compute_dtype="float32"))["compute_dtype"].value == "float32"


def test_logits_of_bfloat16_keep_the_bits_of_float32() -> None:
    """As near to float64 as a product in float32 of the same numbers, where one in bfloat16 is a thousand times off."""
    source = MemorySource(tiny_model("llama"))
    head = Skeleton(source, torch.device("cpu"), torch.bfloat16).head()
    hidden = torch.randn(5, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = head.transform(hidden.double() @ head.weight.double().T)
    naive = head.transform(hidden.float() @ head.weight.float().T)
    rounded = head.transform((hidden @ head.weight.bfloat16().T).float())
    found = head.logits(hidden)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) <= float((naive - exact).abs().max())
    assert float((rounded - exact).abs().max()) > 100 * float((found - exact).abs().max())
