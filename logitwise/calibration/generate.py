"""The model's own sampled answers: calibration text that needs no data set.

Prompts are answered in batches with a static key-value cache. Attention reads the whole cache at every step, so the
cache is kept small: it grows in steps as the answers do, and answers that have ended leave it.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from logitwise.calibration.batches import Keep, answers_of, keep_nothing
from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError

CHUNK = 256  # tokens of the vocabulary that are drawn from together
CACHE_STEP = 64  # positions by which the cache grows; copying it costs about one forward of the batch
LIVE_SHARE = 0.75  # below this share of unfinished answers the cache is compacted
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
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    answers: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=model.device)  # the prompt each row of the batch belongs to
    live = torch.ones_like(rows, dtype=torch.bool)
    capacity = min(round_up(longest), longest + steps)
    cache = StaticCache(model.config, capacity)
    list(layers_of(cache))  # refuses before the first forward
    written = sum(map(len, prompts))
    for length in range(longest, longest + steps):
        output = model(
            input_ids=ids,
            attention_mask=mask[:, :length],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        chosen = choose(output.logits[:, -1])
        for row, token in zip(rows[live].tolist(), chosen[live].tolist(), strict=True):
            answers[row].append(token)
        written += int(live.sum())
        if progress is not None:
            progress(written)
        live &= ~torch.isin(chosen, ends)
        if written >= budget or not live.any():
            break
        ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
        compact = live.float().mean() < LIVE_SHARE
        if compact or length == capacity:
            kept = live.nonzero().squeeze(1) if compact else torch.arange(len(rows), device=rows.device)
            capacity = min(round_up(length + 1), longest + steps)
            resize(cache, model.config, kept, capacity)
            ids, positions, mask, rows, live = (part[kept] for part in (ids, positions, mask, rows, live))
    return answers


def resize(cache: StaticCache, config: PreTrainedConfig, kept: Int64[Tensor, " kept"], capacity: int) -> None:
    """Keep some rows of a cache, in place, and give it room for `capacity` positions, one layer at a time.

    A sliding layer that has reached its window keeps its size: it has begun to overwrite its oldest positions.
    """
    for index, (old, new) in enumerate(zip(layers_of(cache), layers_of(StaticCache(config, capacity)), strict=True)):
        keys, values = (cast(Tensor, part).index_select(0, kept) for part in (old.keys, old.values))
        if new.max_cache_len == old.max_cache_len:
            old.keys, old.values, old.batch_size = keys, values, len(kept)
            continue
        new.lazy_initialization(keys, values)
        for part, filled in ((new.keys, keys), (new.values, values)):
            cast(Tensor, part)[:, :, : old.max_cache_len] = filled
        new.cumulative_length.copy_(old.cumulative_length)
        if isinstance(old, StaticSlidingWindowLayer) and isinstance(new, StaticSlidingWindowLayer):
            new.cumulative_length_int = old.cumulative_length_int
        cache.layers[index] = new


def layers_of(cache: StaticCache) -> Iterator[StaticLayer]:
    """The layers of a cache, one at a time.

    Errors: CalibrationError where one is of a kind that `resize` does not know (a state space, shared keys).
    """
    for index in range(len(cache.layers)):
        layer = cache.layers[index]
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise CalibrationError(
                "this model cannot write its own calibration text",
                f"layer {index} keeps a {type(layer).__name__} where keys and values were expected",
                "give text with --calibration text:FILE or jsonl:FILE",
            )
        yield cast(StaticLayer, layer)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " ends"]:
    """Every token that ends an answer: the generation config's (one or many) and the tokenizer's."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {found} if isinstance(found, int) else set(found or ())
    return torch.tensor(sorted(ends | {tokenizer.eos_token_id} - {None}), dtype=torch.long, device=model.device)


def positions_of(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for, where its config says so."""
    count: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return count


def round_up(length: int) -> int:
    """The multiple of the cache step at or above a length."""
    return math.ceil(length / CACHE_STEP) * CACHE_STEP


def evenly(prompts: list[list[int]], batch: int) -> list[list[list[int]]]:
    """Prompts in the fewest batches of at most `batch`, of sizes that differ by at most one."""
    count = math.ceil(len(prompts) / batch)
    bounds = [len(prompts) * index // count for index in range(count + 1)]
    return [prompts[start:end] for start, end in pairwise(bounds)]


def report(progress: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    """Tell `progress` of `count` tokens beyond those written before, of `total`."""
    progress(min(before + count, total), total)
