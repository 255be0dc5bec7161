"""What becomes of whole answers: when they first differ, whether they loop, whether they end.

Greedy decoding makes a difference of one token a difference of all that follow, so the first one is what counts.
"""

from collections.abc import Sequence
from itertools import pairwise

LOOP_REPEATS = 4
LOOP_TOKENS = 24
"""An answer loops if its end is one phrase so many times over, and so many tokens long at the least."""

GRAM = 4

THINK_MARKERS = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"}
"""What opens a thinking block, and what closes it."""


def first_different(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The index of the first token that differs; the shorter one's length where one goes on; None where none does."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def survival(first: Sequence[int | None], longest: int) -> list[float]:
    """The share of answers still identical after n tokens, for n from 0 to `longest`.

    Args:
        first: for each answer what `first_different` gives. One that never differs stays, however short it is.
    """
    return [sum(index is None or index >= n for index in first) / len(first) for n in range(longest + 1)]


def loops(ids: Sequence[int]) -> bool:
    """Whether an answer's end is one phrase again and again.

    That is: for some period, the last LOOP_REPEATS periods, or LOOP_TOKENS tokens where that is more, repeat it.
    """
    for period in range(1, len(ids) // LOOP_REPEATS + 1):
        length = max(LOOP_REPEATS * period, LOOP_TOKENS)
        if length <= len(ids) and all(
            a == b for a, b in zip(ids[-length:-period], ids[-length + period :], strict=True)
        ):
            return True
    return False


def repeated(ids: Sequence[int], gram: int = GRAM) -> float:
    """The share of an answer's n-grams that stood in it before (seq-rep-n: Welleck et al., 2019, arXiv 1908.04319)."""
    grams = [tuple(ids[start : start + gram]) for start in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def thinking_closes(prompt: str, answer: str) -> bool | None:
    """Whether a thinking block that the template or the answer opens is closed; None where none is opened."""
    for opening, closing in THINK_MARKERS.items():
        opened_before = prompt.rstrip().endswith(opening)
        if opened_before or opening in answer:
            return closing in answer
    return None


def places(ids: Sequence[int], marker: Sequence[int]) -> list[int]:
    """Where a run of tokens begins in an answer."""
    size = len(marker)
    return (
        [start for start in range(len(ids) - size + 1) if list(ids[start : start + size]) == list(marker)]
        if size
        else []
    )


def stretches(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each answer begins and ends among the tokens of all of them."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return list(pairwise(bounds))
