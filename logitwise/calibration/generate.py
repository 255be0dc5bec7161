"""The model's own sampled answers: calibration text that needs no data set.

Prompts are answered in batches, and answers that have ended leave their batch.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitwise.calibration.batches import Keep, answers_of, keep_nothing
from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.decoding import Decoder
from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError

CHUNK = 256  # tokens of the vocabulary that are drawn from together
SPARE_PROMPTS = 1.15  # prompts taken beyond what the mean length asks for; the run stops when enough is written


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token of each answer.

    Args:
        temperature: what logits are divided by; 0 takes the most likely token.
        generator: the random state, this run's own.
    """

    temperature: float
    generator: torch.Generator

    def __call__(self, logits: Float[Tensor, "batch vocabulary"]) -> Int64[Tensor, " batch"]:
        """One token id a row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.temperature).softmax(-1)
        # First a chunk of the vocabulary, then a token of it: the same distribution, but a random number a chunk and
        # not a token, which multinomial draws one after another on a CPU (a fifth of a small model's step).
        chunks = pad(probabilities, (0, -probabilities.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
        chunk = torch.multinomial(chunks.sum(-1), 1, generator=self.generator).squeeze(1)
        inside = chunks[torch.arange(len(chunk), device=chunk.device), chunk]
        return chunk * CHUNK + torch.multinomial(inside, 1, generator=self.generator).squeeze(1)


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int,
    answer_tokens: int,
    batch: int,
    temperature: float = 1.0,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = keep_nothing,
) -> list[Document]:
    """Documents of a prompt and the model's answer to it; only the answer counts, its end token included.

    Prompts are taken in order, each at most once, until `tokens` tokens are written or no prompt is left. What is
    still being written then is kept as far as it got. The global random state is neither read nor changed.

    Args:
        model: in evaluation mode, on the device and in the type to generate with.
        prompts: user messages, put through the chat template where the tokenizer has one.
        tokens: how many to write, prompts included.
        answer_tokens: the longest answer.
        batch: prompts answered at a time.
        temperature: of the sampling; 0 takes the most likely token.
        progress: called after each step with the tokens written and `tokens`.
        keep: where answered batches are kept, and the generator's state after each.

    Returns: the documents, in an order that has nothing to do with their length.

    Errors: CalibrationError where a prompt leaves no room for an answer in the model's positions.
    """
    shuffle = random.Random(seed)
    sampler = Sampler(temperature, torch.Generator(model.device).manual_seed(seed))
    ends = end_ids(model, tokenizer)
    waiting = list(prompts)
    documents: list[Document] = []
    written = 0
    while waiting and written < tokens:
        # The first batch shows how long answers are, and so how many prompts the rest needs.
        if documents:
            needed = math.ceil(SPARE_PROMPTS * (tokens - written) * len(documents) / written)
        else:
            needed = min(batch, math.ceil(tokens / answer_tokens))
        taken = sorted((prompt_ids(tokenizer, prompt) for prompt in waiting[:needed]), key=len)
        waiting = waiting[needed:]
        for part in shuffle.sample(parts := evenly(taken, batch), len(parts)):
            if written >= tokens:
                break
            advance = progress and partial(report, progress, written, tokens)
            write = partial(answer, model, part, ends, answer_tokens, tokens - written, sampler, advance)
            for prompt, ids in zip(part, answers_of(part, write, keep, sampler.generator), strict=True):
                documents.append(Document(prompt + ids, [False] * len(prompt) + [True] * len(ids)))
                written += len(documents[-1].ids)
            if progress is not None:
                report(progress, written, tokens, 0)
    shuffle.shuffle(documents)
    return documents


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    ends: Int64[Tensor, " ends"],
    answer_tokens: int,
    budget: int,
    choose: Callable[[Float[Tensor, "batch vocabulary"]], Int64[Tensor, " batch"]],
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The answer to each prompt, up to an end token, `answer_tokens`, or until `budget` tokens are there in all."""
    longest = max(map(len, prompts))
    steps = answer_tokens if (room := positions_of(model)) is None else min(answer_tokens, room - longest)
    if steps < 1:
        raise CalibrationError(
            f"a prompt of {longest} tokens leaves no room for an answer",
            f"the model has {room} positions",
            "shorten the longest prompts",
        )
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.ones(len(prompts), longest + steps, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, : longest - len(prompt)] = 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask[:, :longest].cumsum(1) - 1).clamp(min=0)

    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # which answers go on
    rows = live  # which answer each row of the batch is
    last = set(ends.tolist())
    decoder = Decoder(model, longest, longest + steps)
    written = sum(map(len, prompts))
    for length in range(longest, longest + steps):
        chosen = choose(decoder(ids, mask[:, : decoder.capacity], positions))
        tokens = dict(zip(rows, chosen.tolist(), strict=True))
        for index in live:
            answers[index].append(tokens[index])
        written += len(live)
        if progress is not None:
            progress(written)
        live = [index for index in live if tokens[index] not in last]
        if written >= budget or not live:
            break
        ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
        compact = len(live) < decoder.live_share * len(rows)
        if compact or length == decoder.capacity:
            still = set(live if compact else rows)
            kept = torch.tensor([row for row, index in enumerate(rows) if index in still], device=mask.device)
            rows = [index for index in rows if index in still]
            decoder.resize(kept, length + 1)
            ids, positions, mask = (part[kept] for part in (ids, positions, mask))
    return answers


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " ends"]:
    """Every token that ends an answer: the generation config's (one or many) and the tokenizer's."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {found} if isinstance(found, int) else set(found or ())
    return torch.tensor(sorted(ends | {tokenizer.eos_token_id} - {None}), dtype=torch.long, device=model.device)


def positions_of(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for, where its config says so."""
    count: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return count


def evenly(prompts: list[list[int]], batch: int) -> list[list[list[int]]]:
    """Prompts in the fewest batches of at most `batch`, of sizes that differ by at most one."""
    count = math.ceil(len(prompts) / batch)
    bounds = [len(prompts) * index // count for index in range(count + 1)]
    return [prompts[start:end] for start, end in pairwise(bounds)]


def report(progress: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    """Tell `progress` of `count` tokens beyond those written before, of `total`."""
    progress(min(before + count, total), total)
