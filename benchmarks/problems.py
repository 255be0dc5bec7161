"""Problems with one right answer, and how many of them a model of cot-22m's kind answers right.

Those of eval/cot_tasks.py as they are, and sums and swaps longer than any that the model was made for (it saw 4 to 7
numbers and 4 to 9 swaps).
"""

import random
from collections import defaultdict
from typing import Any

import torch
from processes import few

from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.generate import Sampler, answer, end_ids
from logitwise.skeleton import load_whole
from logitwise.source import Source

ANSWER_TOKENS = 512
SEED = 800_000  # of which no other figure is made
LENGTHS = {"sum": (4, 7), "swap": (4, 9)}
"""What cot_tasks draws the number of steps from."""
HARDER = {"sum": (7, 8, 9, 10, 12), "swap": (9, 11, 13, 16)}


class Longer(random.Random):
    """Draws as random.Random does, but for the number of steps, which is as told."""

    def __init__(self, seed: str, steps: int) -> None:
        super().__init__(seed)
        self.steps = steps

    def randint(self, a: int, b: int) -> int:
        return self.steps if (a, b) in LENGTHS.values() else super().randint(a, b)


def usual(count: int) -> list[tuple[str, Any]]:
    """`count` problems of each of the five tasks, each with its kind."""
    import cot_tasks

    return [(task, problem) for task in cot_tasks.TASKS for problem in cot_tasks.make(task, SEED, count)]


def harder(count: int) -> list[tuple[str, Any]]:
    """`count` sums and swaps of each length, each with its kind ("sum of 9")."""
    import cot_tasks

    found = []
    for task, lengths in HARDER.items():
        for steps in lengths:
            rng = Longer(f"{task}/{SEED}/{steps}", steps)
            for _ in range(count):
                prompt, reasoning, right = cot_tasks._MAKERS[task](rng, 0.0)
                problem = cot_tasks.Problem(task, prompt, f"{reasoning} Answer: {right}", right)
                found.append((f"{task} of {steps}", problem))
    return found


def accuracy(source: Source, device: torch.device, problems: list[tuple[str, Any]]) -> dict[str, list[int]]:
    """By kind, whether each problem was answered right, by greedy decoding."""
    import cot_tasks

    tokenizer, greedy = source.tokenizer(), Sampler(0, torch.Generator())
    prompts = [prompt_ids(tokenizer, problem.prompt) for _, problem in problems]
    with few():
        model = load_whole(source, device, torch.float32)
        answers = answer(model, prompts, end_ids(model, tokenizer), ANSWER_TOKENS, 10**9, greedy)
        del model
    right: dict[str, list[int]] = defaultdict(list)
    for (kind, problem), ids in zip(problems, answers, strict=True):
        right[kind].append(int(cot_tasks.grade(problem, tokenizer.decode(ids, skip_special_tokens=True))))
    return dict(right)
