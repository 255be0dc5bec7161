"""Held-out documents: whole, enough, and never the calibration's own."""

import pytest

from logitwise.calibration.holdout import set_aside
from logitwise.calibration.rows import Document


def document(first: int, length: int) -> Document:
    ids = list(range(first, first + length))
    return Document(ids, [i % 3 == 0 for i in ids])


def tokens(documents: list[Document]) -> list[int]:
    return [token for document in documents for token in document.ids]


DOCUMENTS = [document(100 * i, 10 + i) for i in range(30)]


def test_whole_documents_are_set_aside_until_the_share_is_reached() -> None:
    kept, held = set_aside(DOCUMENTS, share=0.2, least_tokens=0, seed=0)
    total = len(tokens(DOCUMENTS))
    assert 0.2 * total <= len(tokens(held)) < 0.2 * total + 40
    assert sorted(kept + held, key=lambda d: d.ids[0]) == DOCUMENTS
    assert (kept, held) == set_aside(DOCUMENTS, share=0.2, least_tokens=0, seed=0)
    assert held != set_aside(DOCUMENTS, share=0.2, least_tokens=0, seed=1)[1]


def test_the_least_tokens_count_where_the_share_is_less() -> None:
    held = set_aside(DOCUMENTS, share=0.01, least_tokens=300, seed=0)[1]
    assert 300 <= len(tokens(held)) < 340


def test_a_single_document_is_cut_in_two() -> None:
    whole = document(0, 80)
    kept, held = set_aside([whole], share=0.25, least_tokens=0, seed=0)
    assert (tokens(kept), tokens(held)) == (whole.ids[:60], whole.ids[60:])
    assert kept[0].counts + held[0].counts == whole.counts


@pytest.mark.parametrize("seed", range(6))
def test_a_document_that_holds_nearly_all_is_cut(seed: int) -> None:
    kept, held = set_aside([document(0, 1000), document(2000, 5)], share=0.125, least_tokens=20, seed=seed)
    assert 126 <= len(tokens(held)) <= 131
    assert sorted(tokens(kept) + tokens(held)) == [*range(1000), *range(2000, 2005)]
