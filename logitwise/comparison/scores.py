"""How many problems each model solves, and how surely that differs from full precision."""

from collections.abc import Sequence
from statistics import mean

import torch
from transformers import PreTrainedTokenizerBase

from logitwise.comparison.asked import Asked
from logitwise.comparison.findings import Json, as_json
from logitwise.comparison.written import Answers
from logitwise.measure.figure import paired_shares
from logitwise.measure.tasks import pass_at_k, right


def marks(answers: Answers, asked: Asked, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Whether each answer is right; where there are several times as many answers as problems, problem by problem."""
    tries = len(answers.ids) // len(asked.problems)
    problems = [problem for problem in asked.problems for _ in range(tries)]
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers.ids]
    return [right(problem, text, asked.extractor) for problem, text in zip(problems, texts, strict=True)]


def task_findings(own: Sequence[bool], original: Sequence[bool], seed: int) -> Json:
    """Accuracy with the paired interval of its difference to full precision's.

    Args:
        own, original: whether each problem is answered right.
        seed: of the bootstrap.
    """
    difference, interval = paired_shares(own, original, seed)
    lost = sum(before and not after for before, after in zip(original, own, strict=True))
    gained = sum(after and not before for before, after in zip(original, own, strict=True))
    found = {
        "problems": len(own),
        "accuracy": mean(own),
        "difference": difference,
        "interval": interval,
        "lost": lost,
        "gained": gained,
    }
    return {name: as_json(value) for name, value in found.items()}


def sampled_findings(tried: Sequence[bool], samples: int) -> list[Json]:
    """pass@k for k of 1, 2, 4 ... up to the number of samples.

    Args:
        tried: whether each answer is right, `samples` for each problem, problem by problem.
    """
    rights = torch.tensor(tried).view(-1, samples).sum(1).tolist()
    ks = sorted({1 << power for power in range(samples.bit_length())} | {samples})
    return [as_json({"k": k, "value": mean(pass_at_k(samples, found, k) for found in rights)}) for k in ks]
