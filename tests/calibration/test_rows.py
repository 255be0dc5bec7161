"""Packing: every token once, shifted by one, one separator between documents."""

import pytest

from logitwise.calibration.rows import Document, pack
from logitwise.errors import CalibrationError

SEPARATOR = 9


def test_rows_hold_all_tokens_and_count_what_the_documents_count() -> None:
    rows = pack([Document([1, 2, 3], [False, True, True]), Document([4, 5, 6, 7], [True] * 4)], SEPARATOR, 2)
    assert rows.ids.tolist() == [[1, 2], [3, 9], [4, 5], [6, 7]]
    assert rows.following.tolist() == [[2, 3], [9, 4], [5, 6], [7, 9]]
    assert rows.weights.tolist() == [[1, 1], [0, 1], [1, 1], [1, 0]]
    assert rows.counted() == 6


@pytest.mark.parametrize(
    ("documents", "ids", "weights"),
    [
        ([[1, 9], [2, 3, 9], [4]], [1, 9, 2, 3, 9], [1, 1, 1, 1, 1]),  # an end token that is the separator counts
        ([[9, 1], [9, 2, 3], [4]], [9, 1, 9, 2, 3], [1, 0, 1, 1, 0]),  # a beginning token is the separator itself
        ([[1, 9], [9, 2], [4, 5]], [1, 9, 2, 9, 4], [1, 1, 0, 1, 1]),
        ([[1], [], [2, 3], [4]], [1, 9, 2, 3, 9], [0, 1, 1, 0, 1]),
    ],
)
def test_a_separator_the_document_brings_stands_once(
    documents: list[list[int]], ids: list[int], weights: list[int]
) -> None:
    rows = pack([Document(part, [True] * len(part)) for part in documents], SEPARATOR, 5)
    assert rows.ids[0].tolist() == ids
    assert rows.weights[0].tolist() == weights


def test_less_than_a_row_is_refused() -> None:
    assert len(pack([Document([1, 2, 3, 4], [True] * 4)], SEPARATOR, 4)) == 1
    with pytest.raises(CalibrationError, match=r"4 calibration tokens are too few\n.*one row takes 4"):
        pack([Document([1, 2, 3], [True] * 3)], SEPARATOR, 4)
