"""Problems of arithmetic with one right answer, made from a seed: no data set is needed, and they never run out."""

import random
from collections.abc import Callable

from logitwise.measure.tasks import Problem

PEOPLE = ("Ada", "Bela", "Carl", "Dora", "Emil", "Finn", "Gita", "Hana")
THINGS = ("marbles", "pencils", "tickets", "buttons", "candles", "lemons", "ribbons", "bricks")
KINDS_IN_TURN = 3


def make_problems(count: int, seed: int) -> list[Problem]:
    """`count` problems, the kinds in turn: a sum, a product, a story of some steps. Answers are whole numbers."""
    generator = random.Random(f"logitwise problems {seed}")
    makers: tuple[Callable[[random.Random], Problem], ...] = (_sum, _product, _story)
    return [makers[index % KINDS_IN_TURN](generator) for index in range(count)]


def _sum(generator: random.Random) -> Problem:
    numbers = [generator.randint(11, 999) for _ in range(generator.randint(4, 7))]
    return Problem(f"What is {' + '.join(map(str, numbers))}?", str(sum(numbers)))


def _product(generator: random.Random) -> Problem:
    one, other = generator.randint(12, 999), generator.randint(12, 99)
    return Problem(f"What is {one} times {other}?", str(one * other))


def _story(generator: random.Random) -> Problem:
    (person, friend), thing = generator.sample(PEOPLE, 2), generator.choice(THINGS)
    held = generator.randint(10, 60)
    sentences = [f"{person} has {held} {thing}."]
    for _ in range(generator.randint(3, 6)):
        step = generator.choice(("buys", "gives", "finds"))
        if step == "buys":
            boxes, each = generator.randint(2, 9), generator.randint(2, 12)
            sentences.append(f"{person} buys {boxes} boxes with {each} {thing} each.")
            held += boxes * each
        elif step == "gives":
            given = generator.randint(1, max(1, held - 1))
            sentences.append(f"{person} gives {given} {thing} to {friend}.")
            held -= given
        else:
            found = generator.randint(3, 40)
            sentences.append(f"Then {person} finds {found} more.")
            held += found
    return Problem(" ".join([*sentences, f"How many {thing} does {person} have now?"]), str(held))
