"""How an engine is asked: one question a line of JSON on standard input, one answer a line on standard output.

It runs in the engine's own environment and needs numpy alone. A question has `path`, a checkpoint, and `ids`, tokens;
its answer `log_probabilities` of each token after the first, in nats, or `error` in the engine's own words. Where
`prompt`, tokens too, is there, `greedy` answers it with the likeliest `count` tokens, ends of text included.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

Answer = dict[str, Any]


class Model(Protocol):
    """A checkpoint as an engine has loaded it."""

    def logits(self, ids: list[int]) -> Any:
        """What follows each token: logits [tokens, vocabulary]."""


def answer_all(answer: Callable[[Answer], Answer], packages: list[str]) -> None:
    """Answers until there are no more questions; first, which versions of the packages answer."""
    # Engines print what they like, so that standard output is kept for answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        print(json.dumps({name: version(name) for name in packages}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                found = answer(json.loads(line))
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)


def by_logits(load: Callable[[str], Model]) -> Callable[[Answer], Answer]:
    """The answers of an engine that gives logits."""

    def answer(asked: Answer) -> Answer:
        model, ids = load(asked["path"]), asked["ids"]
        found: Answer = {"log_probabilities": log_probabilities(model, ids)}
        if "prompt" in asked:
            found["greedy"] = greedy(model, asked["prompt"], asked["count"])
        return found

    return answer


def log_probabilities(model: Model, ids: list[int]) -> list[float]:
    """Of each token after the first, given those before it; in nats, normalised in float64."""
    logits = np.asarray(model.logits(ids), np.float64)[:-1]
    logits -= logits.max(-1, keepdims=True)
    found = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))
    return [float(one) for one in found]


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens one after another, without a cache of what was computed before."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.asarray(model.logits(ids)[-1]).argmax()))
    return ids[len(prompt) :]
