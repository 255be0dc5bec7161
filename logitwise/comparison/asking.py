"""What a served model answers, and what it says of full precision's answers; every finished part is kept."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TypeVar

import torch
from torch.nn.functional import pad

from logitwise.calibration.chat import text_ids
from logitwise.comparison.replies import Named
from logitwise.comparison.served import CHAT, Prompt, Reply, Served
from logitwise.comparison.written import Answers, Manner
from logitwise.measure.answers import THINK_MARKERS
from logitwise.measure.coarse import Reported
from logitwise.runfolder import RunFolder, chain
from logitwise.watch import Watcher

AT_ONCE = 16
"""Requests under way at a time; the server batches them."""

PART = 32
"""Requests that are kept together: what an interruption loses."""

Given = TypeVar("Given")
Taken = TypeVar("Taken")


def ask_answers(
    served: Served,
    prompts: Sequence[Prompt],
    manner: Manner,
    ends: Sequence[int],
    folder: RunFolder,
    watcher: Watcher,
    title: str = "answers",
) -> Answers:
    """A served model's answers, in the order of the prompts; those that the folder has are read.

    Args:
        ends: the tokens that end an answer, by full precision.

    Errors: MachineError where the server fails.
    """
    ids: list[list[int]] = []
    ended: list[bool] = []
    own_end = served.tokenizer.eos_token_id
    if not manner.temperature:
        manner = replace(manner, seed=0)  # which greedy answers do not depend on
    with watcher.stage(f"{served.name}: {title}", len(prompts)) as stage:
        for start in range(0, len(prompts), PART):
            part = list(enumerate(prompts))[start : start + PART]
            words = [asdict(prompt) for _, prompt in part]
            key = chain("asked", model=served.digest, prompts=words, first=start, **asdict(manner))
            if not folder.has(key):

                def ask(numbered: tuple[int, Prompt]) -> Reply:
                    number, prompt = numbered
                    return served.answer(prompt, manner.answer_tokens, manner.temperature, manner.seed + number)

                replies = []
                for reply in _at_once(ask, part):
                    replies.append(asdict(reply))
                    stage.advance()
                folder.save_tensors(key, {}, {"replies": replies})
            for reply in (Reply(**one) for one in folder.record(key)["replies"]):
                found = text_ids(served.tokenizer, reply.text, special=False) if reply.ids is None else reply.ids
                if reply.ended and own_end is not None and not (found and found[-1] in ends):
                    found = [*found, own_end]
                ids.append(found)
                ended.append(reply.ended)
            stage.reach(len(ids))
    return Answers(ids, ended, list(ends))


def as_served(answers: Answers, served: Served) -> Answers:
    """Full precision's answers as they would come back from a server that says texts: through text, and tokenized."""
    if served.says_ids:
        return answers
    tokenizer, found = served.tokenizer, []
    for ids, ended in zip(answers.ids, answers.ended, strict=True):
        text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        end = [tokenizer.eos_token_id] if ended and tokenizer.eos_token_id is not None else []
        found.append(text_ids(tokenizer, text, special=False) + end)
    return replace(answers, ids=found)


def shows_thinking(served: Served) -> bool:
    """Whether the end of a thinking block would be seen in an answer: not where it is cut out of the text."""
    if served.says_ids:
        return True
    special = set(served.tokenizer.all_special_tokens)
    return served.prompts != CHAT and not special & set(THINK_MARKERS.values())


def ask_reported(
    served: Served,
    prompts: Sequence[Prompt],
    answers: Sequence[list[int]],
    folder: RunFolder,
    watcher: Watcher,
) -> Reported:
    """What a served model says of each token of full precision's answers; parts that the folder has are read.

    Errors: MachineError where the server fails.
    """
    found: list[dict[str, torch.Tensor]] = []
    pairs = [(prompt.ids, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    with watcher.stage(f"{served.name}: reading them", len(pairs)) as stage:
        for start in range(0, len(pairs), PART):
            part = pairs[start : start + PART]
            key = chain("reported", model=served.digest, rows=part, likeliest=served.likeliest)
            if not folder.has(key):

                def ask(pair: tuple[list[int], list[int]]) -> list[Named | None]:
                    prompt, answer = pair
                    named = served.named(prompt + answer)
                    return named[-len(answer) :] if named else [None] * len(answer)

                said: list[Named | None] = []
                for one in _at_once(ask, part):
                    said += one
                    stage.advance()
                folder.save_tensors(key, vars(as_tensors(said)), {})
            found.append(folder.load_tensors(key))
            stage.reach(start + len(part))
    most = max(part["ids"].shape[1] for part in found)
    padded = {
        name: [pad(part[name], (0, most - part[name].shape[1]), value=fill) for part in found]
        for name, fill in (("ids", -1), ("log_q", 0))
    }
    return Reported(torch.cat(padded["ids"]), torch.cat(padded["log_q"]), torch.cat([part["told"] for part in found]))


def as_tensors(said: Sequence[Named | None]) -> Reported:
    """Positions as rows of tensors."""
    most = max((len(named) for named in said if named), default=1)
    ids = [[token for token, _ in named or ()] for named in said]
    log_q = [[value for _, value in named or ()] for named in said]
    return Reported(
        torch.tensor([row + [-1] * (most - len(row)) for row in ids], dtype=torch.int64),
        torch.tensor([row + [0.0] * (most - len(row)) for row in log_q], dtype=torch.float64),
        torch.tensor([named is not None for named in said]),
    )


def _at_once(ask: Callable[[Given], Taken], waiting: Sequence[Given]) -> Iterator[Taken]:
    """What comes back of several requests, in their order; where one fails, those not begun are not made."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield from pool.map(ask, waiting)
    finally:
        pool.shutdown(cancel_futures=True)
