"""Calibration against closed forms."""

from dataclasses import replace

import pytest
import torch
from source_files import tokenizer

from logitwise.measure.confidence import calibration, forking, reliability, turning_ids
from logitwise.measure.divergence import Divergence, compared


def made(confidence: list[float], backing: list[float]) -> Divergence:
    p = torch.tensor([[0.6, 0.4]]).double().log().repeat(len(confidence), 1)
    found = Divergence(*compared(p, p, torch.zeros(len(confidence), dtype=torch.int64)))
    return replace(found, student_confidence=torch.tensor(confidence), backing=torch.tensor(backing))


def test_full_precision_is_calibrated() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    found = calibration(Divergence(*compared(logits, logits, torch.zeros(50, dtype=torch.int64))), torch.arange(50))
    assert found is not None
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.overconfidence.mean == pytest.approx(0, abs=1e-12)
    assert found.agrees.mean == 1


def test_the_error_is_weighted_by_tokens() -> None:
    found = calibration(made([0.95, 0.95, 0.95, 0.35], [0.55, 0.65, 0.75, 0.45]), torch.arange(4))
    assert found is not None
    assert found.error == pytest.approx(0.75 * 0.3 + 0.25 * 0.1)
    assert found.overconfidence.mean == pytest.approx((0.4 + 0.3 + 0.2 - 0.1) / 4)
    assert [part.tokens for part in found.bins] == [1, 3]


def test_full_confidence_is_in_the_last_bin() -> None:
    (only,) = reliability(torch.tensor([1.0, 0.91]), torch.tensor([1.0, 0.5]))
    assert only.tokens == 2


def test_positions_can_be_chosen() -> None:
    found = made([0.9, 0.2], [0.1, 0.2])
    chosen = calibration(found, torch.arange(2), torch.tensor([False, True]))
    assert chosen is not None
    assert (chosen.tokens, chosen.error) == (1, pytest.approx(0))
    assert calibration(found, torch.arange(2), torch.tensor([False, False])) is None


def test_forking_tokens_are_the_fifth_of_highest_entropy() -> None:
    entropy = torch.randperm(100, generator=torch.Generator().manual_seed(2)).double()
    assert entropy[forking(entropy)].sort().values.tolist() == [float(value) for value in range(80, 100)]


def test_turning_words_are_single_tokens() -> None:
    """This tokenizer has letters and three merges: `the` is one token, `Wait` is four."""
    found = turning_ids(tokenizer(), ["the", "Wait"])
    assert tokenizer().convert_ids_to_tokens(found.tolist()) == ["the"]
