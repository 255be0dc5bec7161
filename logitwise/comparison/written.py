"""What each model answers, in batches; every finished batch is kept, so that nothing is written twice."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitwise.calibration.generate import Sampler, answer, end_ids
from logitwise.comparison.candidates import Candidate
from logitwise.runfolder import RunFolder, chain
from logitwise.skeleton import load_whole
from logitwise.watch import Watcher

BATCH = 32
"""Prompts answered at a time: what an interruption loses."""

NO_BUDGET = 1 << 62


@dataclass(frozen=True)
class Manner:
    """How answers are written.

    Args:
        answer_tokens: the longest answer.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of the sampling.
        device, dtype: where and in which type.
    """

    answer_tokens: int
    temperature: float
    seed: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Answers:
    """One model's answers.

    Args:
        ids: the tokens of each, the end token included.
        ended: whether each came to its end by itself.
        ends: the tokens that end an answer.
    """

    ids: list[list[int]]
    ended: list[bool]
    ends: list[int]


def write_answers(
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    manner: Manner,
    folder: RunFolder,
    watcher: Watcher,
    title: str = "answers",
    ends: Sequence[int] = (),
) -> Answers:
    """A model's answers to tokenized prompts, in their order; those that the folder has are read.

    They end at a token of `ends`, or else of the model's own: what a checkpoint's files say of it is not the damage of
    its weights, and not every format holds it all.

    Similar lengths are answered together: what a batch pads is computed for nothing.
    """
    if not manner.temperature:
        manner = replace(manner, seed=0)  # which greedy answers do not depend on
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    model: PreTrainedModel | None = None
    found: dict[int, list[int]] = {}
    found_ends: list[int] = []
    stop = torch.tensor(sorted(ends), dtype=torch.long, device=manner.device)
    with watcher.stage(f"{candidate.name}: {title}", len(prompts)) as stage:
        for number, part in enumerate(parts):
            asked = [prompts[index] for index in part]
            key = chain(
                "answers", model=candidate.digest, prompts=asked, part=number, ends=sorted(ends), **asdict(manner)
            )
            if not folder.has(key):
                if model is None:
                    model = load_whole(candidate.source, torch.device(manner.device), getattr(torch, manner.dtype))
                sampler = Sampler(manner.temperature, torch.Generator(manner.device).manual_seed(manner.seed + number))
                stop = stop if len(stop) else end_ids(model, tokenizer)
                share = _share(asked, manner.answer_tokens, len(found), stage.reach)
                ids = answer(model, asked, stop, manner.answer_tokens, NO_BUDGET, sampler, share)
                folder.save_tensors(key, {}, {"answers": ids, "ends": stop.tolist()})
            record = folder.record(key)
            found |= dict(zip(part, record["answers"], strict=True))
            found_ends = record["ends"]
            stage.reach(len(found))
    if model is not None:
        del model
        gc.collect()  # a model's modules refer to one another
        torch.cuda.empty_cache()
    ids = [found[index] for index in range(len(prompts))]
    return Answers(ids, [one[-1] in found_ends for one in ids], found_ends)


def _share(
    asked: Sequence[list[int]], answer_tokens: int, before: int, reach: Callable[[float], None]
) -> Callable[[int], None]:
    """Turns the tokens that are written of a batch into prompts done."""
    read = sum(map(len, asked))
    return lambda written: reach(before + (written - read) / answer_tokens)
