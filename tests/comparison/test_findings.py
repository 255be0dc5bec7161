"""Findings of answers and scores by hand, and what JSON cannot hold."""

import json
import math

import pytest
import torch
from source_files import tokenizer

from logitwise.comparison.asked import Asked
from logitwise.comparison.findings import answer_findings, as_json, side_by_side
from logitwise.comparison.scores import marks, sampled_findings, task_findings
from logitwise.comparison.written import Answers
from logitwise.measure.figure import Figure
from logitwise.measure.tasks import Problem

WORDS = tokenizer()


def answers(*texts: str, ended: bool = True) -> Answers:
    ids = [WORDS.encode(text, add_special_tokens=False) for text in texts]
    return Answers([[*one, 1] if ended else one for one in ids], [ended] * len(texts), [1])


def test_answers_beside_one_another() -> None:
    original, own = answers("the hen", "a net"), answers("the hat", "a net")
    many, ours = answers(*["a net"] * 6), answers(*["a net"] * 6)
    alike = answer_findings(ours, many, ["?"] * 6, WORDS)
    assert alike["ended_interval"] == alike["loops_interval"] == [0, 0]
    found = answer_findings(own, original, ["?", "?"], WORDS)
    assert found["identical"] == 0.5
    assert found["first_different_median"] == 3  # the, space, h | e
    assert found["survival"] == [1, 1, 1, 1, 0.5, 0.5, 0.5]
    assert found["ended"] == 1
    assert found["ended_interval"] is found["loops_interval"] is None  # too few
    assert found["thinking"] is None
    first, second = side_by_side(original, [original], [own], ["one", "two"], WORDS)
    assert first["prompt"] == "one"
    (differing,), (same,) = first["models"], second["models"]
    assert (differing["same"], differing["rest"], differing["first_different"]) == ("the h", "at", 3)
    assert (same["same"], same["rest"], same["first_different"]) == ("a net", "", None)


def test_answers_that_loop_and_never_end() -> None:
    looping, whole = answers(*["ha" * 20] * 6, ended=False), answers(*["a net"] * 6)
    found = answer_findings(looping, whole, ["?"] * 6, WORDS)
    assert (found["loops"], found["ended"], found["identical"]) == (1, 0, 0)
    assert (found["loops_interval"], found["ended_interval"]) == ([1, 1], [-1, -1])
    assert found["repeated"] > 0.9


def test_a_difference_of_few_answers_may_be_chance() -> None:
    """Of 12 answers one less ends, then 7: exact, the chance that no resample draws the one is (11 / 12)^12, .35."""
    whole, cut = answers("a net"), answers("a net", ended=False)
    for lost, sure in ((1, False), (7, True)):
        own = Answers([*cut.ids * lost, *whole.ids * (12 - lost)], [False] * lost + [True] * (12 - lost), [1])
        low, high = answer_findings(own, Answers(whole.ids * 12, [True] * 12, [1]), ["?"] * 12, WORDS)["ended_interval"]
        assert low < -lost / 12 < high
        assert (high < 0) == sure


def test_thinking_is_counted_where_it_is_opened() -> None:
    own = answers("<think>so</think>4", "<think>so and", "4")
    found = answer_findings(own, own, ["?", "?", "?"], WORDS)
    assert found["thinking"] == {"opened": 2, "closed": 0.5}


def test_problems_lost_and_gained() -> None:
    found = task_findings([True, False, False, True] * 2, [True, True, True, False] * 2, seed=0)
    assert (found["accuracy"], found["difference"], found["lost"], found["gained"]) == (0.5, -0.25, 4, 2)
    assert found["interval"][0] < -0.25 < found["interval"][1]
    assert task_findings([True, False] * 3, [True, False] * 3, seed=0)["interval"] == [0, 0]
    assert task_findings([False] * 5, [True] * 5, seed=0)["interval"] is None


def test_marks_of_several_tries() -> None:
    asked = Asked([], "", [Problem("", "4"), Problem("", "5")], "", "last-number")
    assert marks(answers("4", "it is 4", "6", "5"), asked, WORDS) == [True, True, False, True]


def test_pass_at_k_of_several_problems() -> None:
    """Of 3 tries 0, 1 and 3 are right: pass@1 is the mean share; pass@2 of one right try in three is 2/3."""
    tried = [False, False, False, True, False, False, True, True, True]
    found = {entry["k"]: entry["value"] for entry in sampled_findings(tried, 3)}
    assert found == {
        1: pytest.approx(4 / 9, rel=1e-5),
        2: pytest.approx(5 / 9, rel=1e-5),
        3: pytest.approx(2 / 3, rel=1e-5),
    }


def test_what_cannot_be_told_is_null() -> None:
    found = as_json(
        {"figure": Figure(1 / 3, math.nan), "list": [math.inf, 2, "x", None], "exact": torch.tensor(1).item()}
    )
    assert found == {"figure": {"mean": 0.333333, "standard_error": None}, "list": [None, 2, "x", None], "exact": 1}
    json.dumps(found, allow_nan=False)
