"""Problems repeat by seed, and their answers are right."""

import re

from logitwise.measure.problems import make_problems


def test_a_seed_makes_the_same_problems() -> None:
    assert make_problems(9, 1) == make_problems(9, 1)
    assert make_problems(9, 1) != make_problems(9, 2)
    assert make_problems(4, 1) == make_problems(9, 1)[:4]


def test_answers_are_right() -> None:
    """Each prompt solved by reading it again."""
    for problem in make_problems(90, 3):
        numbers = list(map(int, re.findall(r"\d+", problem.prompt)))
        if " times " in problem.prompt:
            expected = numbers[0] * numbers[1]
        elif " + " in problem.prompt:
            expected = sum(numbers)
        else:
            first, *steps = problem.prompt.split(". ")
            expected = int(re.search(r"\d+", first)[0])  # type: ignore[index]
            for step in steps:
                found = list(map(int, re.findall(r"\d+", step)))
                if "buys" in step:
                    expected += found[0] * found[1]
                elif found:
                    expected += -found[0] if "gives" in step else found[0]
        assert problem.answer == str(expected), problem.prompt
