"""First difference, survival, loops and thinking blocks on answers written by hand."""

import pytest

from logitwise.measure.answers import first_different, loops, places, repeated, stretches, survival, thinking_closes


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2], [1], 1), ([], [], None)],
)
def test_the_first_difference(one: list[int], other: list[int], index: int | None) -> None:
    assert first_different(one, other) == index


def test_survival_counts_tokens_before_the_difference() -> None:
    """A difference at index 0 is none survived; an answer that never differs survives to the end."""
    assert survival([0, 2, None, 2], 4) == [1.0, 0.75, 0.75, 0.25, 0.25]


@pytest.mark.parametrize("period", [1, 2, 5, 11])
def test_a_loop_of_any_period(period: int) -> None:
    phrase = list(range(100, 100 + period))
    times = max(4, -(-24 // period))
    assert loops([1, 2, 3, *phrase * times])
    assert loops([1, 2, 3, *phrase * times, *phrase[: period // 2]]), "it may stop inside the phrase"
    assert not loops([1, 2, 3, *phrase * times, 7]), "it went on with something else"


def test_few_repeats_are_no_loop() -> None:
    assert not loops([5] * 23)
    assert loops([5] * 24)
    assert not loops(list(range(30)) * 3)
    assert not loops(list(range(200)))


def test_repeated_grams() -> None:
    assert repeated([1, 2, 3, 4, 5, 6]) == 0
    assert repeated([7] * 13) == pytest.approx(1 - 1 / 10)
    assert repeated([1, 2, 3]) == 0, "shorter than one n-gram"


@pytest.mark.parametrize(
    ("prompt", "answer", "closes"),
    [
        ("Hi", "<think>so</think> 4", True),
        ("Hi", "<think>so and so", False),
        ("Hi <think>\n", "so</think> 4", True),
        ("Hi <think>\n", "so and so", False),
        ("Why <think> here?", "It is a tag.", None),
    ],
)
def test_thinking(prompt: str, answer: str, closes: bool | None) -> None:
    assert thinking_closes(prompt, answer) is closes


def test_places_and_stretches() -> None:
    assert places([1, 2, 3, 1, 2], [1, 2]) == [0, 3]
    assert places([1, 2], []) == []
    assert stretches([2, 0, 3]) == [(0, 2), (2, 2), (2, 5)]
