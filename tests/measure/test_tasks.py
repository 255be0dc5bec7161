"""Extractors on answers as models write them; pass@k against counting."""

from itertools import combinations

import pytest

from logitwise.measure.tasks import EXTRACTORS, Problem, pass_at_k, right


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("last-number", "First 3, then 1,234.50 in all.", "1234.5"),
        ("last-number", "It is -7.", "-7"),
        ("last-number", "x = \u22125, or so", "-5"),
        ("last-number", "from 5-3", "3"),
        ("last-number", "none", None),
        ("after-hashes", "so 9 * 2 = 18\n#### 18", "18"),
        ("after-hashes", "#### $1,000.", "1000"),
        ("after-hashes", "18", None),
        ("gsm8k", "The result is 18.", "18"),
        ("gsm8k", "#### Step 1: think\nso it is 42", "42"),
        ("gsm8k", "#### 5 apples", "5"),
        ("gsm8k", "12 ... #### 18\nand 4 more", "18"),
        ("after-answer", "Answer: 12. No: Answer: lamp", "lamp"),
        ("after-answer", "**Answer:** 1,200.", "1200"),
        ("after-answer", "12", None),
        ("exact", " yes\n", "yes"),
        ("choice", "A is tempting, but the answer is (C).", "C"),
        ("choice", "I choose B", "B"),
        ("choice", "The answer I choose is B.", "B"),
        ("choice", "C. I am sure", "C"),
        ("choice", "(A), since A dog is one.", "A"),
        ("choice", "Answer: I", "I"),
        ("choice", "nothing", None),
    ],
)
def test_extractors(extractor: str, text: str, answer: str | None) -> None:
    assert EXTRACTORS[extractor](text) == answer


def test_both_sides_are_read_alike() -> None:
    assert right(Problem("", "half of 36 #### 18"), "It is 18.", "gsm8k")
    assert right(Problem("", "18"), "so #### 18.00", "after-hashes")
    assert right(Problem("", "1,000"), "Answer: 1,000", "after-answer")
    assert right(Problem("", "5.0"), "#### 5", "after-hashes")
    assert not right(Problem("", "18"), "#### 19", "after-hashes")
    assert not right(Problem("", "18"), "no idea", "last-number")


def test_pass_at_k_is_the_share_of_subsets_with_a_right_try() -> None:
    tries = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        subsets = list(combinations(tries, k))
        assert pass_at_k(7, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@8 of 7"):
        pass_at_k(7, 2, 8)
