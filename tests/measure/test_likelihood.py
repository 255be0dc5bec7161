"""Perplexity, KL and agreement against their definitions, and their standard errors against a closed form."""

import math

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model

from logitwise.calibration.rows import Rows
from logitwise.evaluation import measure_models
from logitwise.measure.figure import Figure
from logitwise.measure.likelihood import as_json, kl_difference, summarise
from logitwise.objectives.soft import Comparison


def rows_of(seed: int, count: int = 5, tokens: int = 21) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, tokens + 1), generator=generator)
    weights = (torch.rand(count, tokens, generator=generator) < 0.6).float()
    return Rows(ids[:, :-1], ids[:, 1:], weights)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_figures_are_their_definitions(family: str) -> None:
    model, other, rows = tiny_model(family, seed=0), tiny_model(family, seed=1), rows_of(3)
    reference, source = MemorySource(model), MemorySource(other)
    same, found = measure_models([reference, source], reference, rows, "cpu")
    with torch.no_grad():
        p = torch.log_softmax(model(input_ids=rows.ids).logits.double(), -1)
        q = torch.log_softmax(other(input_ids=rows.ids).logits.double(), -1)
    counted = rows.weights > 0
    kl = (p.exp() * (p - q)).sum(-1)[counted].mean()
    nll = -q.gather(-1, rows.following.unsqueeze(-1)).squeeze(-1)[counted].mean()
    agreement = (p.argmax(-1) == q.argmax(-1))[counted].double().mean()
    assert found.kl.mean == pytest.approx(float(kl), rel=1e-5)
    assert found.perplexity.mean == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert found.top1.mean == pytest.approx(float(agreement))
    assert found.tokens == int(counted.sum())
    assert same.kl.mean == pytest.approx(0, abs=1e-6)
    assert same.top1 == Figure(1.0, 0.0)


def test_the_standard_error_is_that_of_rows() -> None:
    """With one token a row it is the textbook error of a mean; copies of a token in a row add no information."""
    values = torch.tensor([1.0, 4.0, 2.0, 7.0, 6.0], dtype=torch.float64)
    textbook = float(values.std() / math.sqrt(5))
    one = torch.ones(5, dtype=torch.float64)
    alone = summarise(Comparison(values, one, values, values), torch.arange(5), one)
    assert alone.kl.mean == pytest.approx(4.0)
    assert alone.kl.error == pytest.approx(textbook)
    copies = values.repeat_interleave(9)
    ones = torch.ones(45, dtype=torch.float64)
    repeated = summarise(Comparison(copies, ones, copies, copies), torch.arange(5).repeat_interleave(9), ones)
    assert repeated.kl.error == pytest.approx(textbook)
    assert repeated.perplexity.mean == pytest.approx(math.exp(4.0))
    assert repeated.perplexity.error == pytest.approx(math.exp(4.0) * textbook)


def test_one_row_has_no_error_to_tell() -> None:
    one = torch.ones(3, dtype=torch.float64)
    found = summarise(Comparison(one, one, one, one), torch.zeros(3, dtype=torch.int64), one)
    assert math.isnan(found.kl.error)
    assert as_json(found)["kl"]["mean"] == 1.0


def test_a_difference_of_two_models_is_paired_by_rows() -> None:
    """Rows that both models find hard cancel: the error is that of the rows' differences."""
    hard = torch.tensor([10.0, 90.0, 40.0, 70.0], dtype=torch.float64)
    gain = torch.tensor([1.0, 2.0, 1.0, 4.0], dtype=torch.float64)
    one, row = torch.ones(4, dtype=torch.float64), torch.arange(4)
    worse, better = (summarise(Comparison(kl, one, one, one), row, one) for kl in (hard + gain, hard))
    found = kl_difference(worse, better)
    assert found.mean == pytest.approx(2.0)
    assert found.error == pytest.approx(float(gain.std() / 2))
    assert worse.kl.error > 10 * found.error
