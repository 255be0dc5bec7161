"""Documents set aside to judge a fit on text it was not fitted to."""

import random
from collections.abc import Sequence

from logitwise.calibration.rows import Document


def set_aside(
    documents: Sequence[Document], *, share: float = 1 / 8, least_tokens: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """Documents to calibrate on and documents held out, both in the order given.

    Whole documents are held out, chosen by the seed, until they have `share` of all tokens and `least_tokens` at
    least. One that would bring them above half of all tokens is cut in two instead, its end held out (a single
    document always is).
    """
    total = sum(len(document.ids) for document in documents)
    target = max(least_tokens, round(share * total))
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    held: dict[int, int] = {}  # document -> the token its held-out part begins at
    count = 0
    for index in order:
        if count >= target:
            break
        length = len(documents[index].ids)
        taken = length if count + length <= max(total / 2, target) and length < total else min(length, target - count)
        held[index] = length - taken
        count += taken
    calibration = [part(document, 0, held.get(index)) for index, document in enumerate(documents)]
    held_out = [part(documents[index], held[index], None) for index in sorted(held)]
    return [document for document in calibration if document.ids], held_out


def part(document: Document, start: int, end: int | None) -> Document:
    """The tokens of a document from `start` up to `end`."""
    return Document(document.ids[start:end], document.counts[start:end])
