"""Tokens a second of greedy answers, beside transformers' own `generate` in the same run, and how many are the same.

    python benchmarks/generation.py --model cot-22m --eval eval --out results.json [--batches 8 32 128] [--tokens 256]
        [--shapes llama-3.1-8b]

cot-22m answers task prompts, with stop tokens. Models of other shapes have random weights and prompts, and no stop
token: their answers hang on rounding, so only the first token of each is compared. `generate` is as it comes (its own
cache, no compiling), on the same left-padded batch. Each way answers a few tokens first; then the least of `--repeats`
interleaved times counts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lfq_cost import SHAPES
from processes import about
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.generate import Sampler, answer, end_ids
from logitwise.skeleton import load_whole
from logitwise.source import open_source

CUDA = torch.cuda.is_available()
SEED = 960_000  # of which no figure but speed is made
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)
SHAPES = SHAPES | {"smollm2-135m": {**SMOLLM2, "depth": 30}}


def main() -> None:
    """A line for each model, type and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=[], choices=SHAPES)
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    if given.model:
        for dtype in ("float32", "bfloat16") if CUDA else ("float32",):
            model, prompts, ends = of_tasks(given, dtype)
            found += measure(f"{given.model.name}, {dtype}", model, prompts, ends, given)
    for shape in given.shapes:
        model, prompts = random_model(shape, max(given.batches))
        found += measure(f"{shape}, bfloat16", model, prompts, torch.tensor([], dtype=torch.long), given)
        del model
        torch.cuda.empty_cache()
    given.out.write_text(json.dumps({**about("cuda" if CUDA else "cpu"), "arguments": sys.argv[1:], "results": found}))


def of_tasks(given: argparse.Namespace, dtype: str) -> tuple[PreTrainedModel, list[list[int]], torch.Tensor]:
    """A model, prompts of the five tasks, and the tokens that end an answer."""
    sys.path.insert(0, str(given.eval))
    import cot_tasks

    source = open_source(given.model)
    tokenizer = source.tokenizer()
    count = max(given.batches)
    made = {task: cot_tasks.make(task, SEED, count) for task in cot_tasks.TASKS}
    prompts = [prompt_ids(tokenizer, made[task][index].prompt) for index in range(count) for task in cot_tasks.TASKS]
    model = load_whole(source, torch.device("cuda" if CUDA else "cpu"), getattr(torch, dtype))
    return model, prompts[:count], end_ids(model, tokenizer)


def random_model(shape: str, count: int) -> tuple[PreTrainedModel, list[list[int]]]:
    """A model of this shape, and prompts of 20 to 59 tokens."""
    config = dict(SHAPES[shape])
    depth = config.pop("depth")
    made = LlamaConfig(**config, num_hidden_layers=depth, max_position_embeddings=4096, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    lengths = [20 + 7 * index % 40 for index in range(count)]
    return model, [torch.randint(3, made.vocab_size, (length,)).tolist() for length in lengths]


def measure(
    name: str, model: PreTrainedModel, prompts: list[list[int]], ends: torch.Tensor, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both ways at each batch: seconds, tokens a second, answers that are the same."""
    found = []
    for batch in given.batches:
        part = prompts[:batch]
        ways: dict[str, Callable[[int], list[list[int]]]] = {
            "generate": lambda tokens, part=part: by_generate(model, part, ends, tokens),
            "logitwise": lambda tokens, part=part: answer(
                model, part, ends.to(model.device), tokens, 1 << 62, Sampler(0, torch.Generator())
            ),
        }
        answers, seconds = {}, dict.fromkeys(ways, float("inf"))
        for way in ways:
            ways[way](8)
        for _ in range(given.repeats):
            for way in ways:
                began = time.perf_counter()
                answers[way] = ways[way](given.tokens)
                if CUDA:
                    torch.cuda.synchronize()
                seconds[way] = min(seconds[way], time.perf_counter() - began)
        same = sum(a == b for a, b in zip(*answers.values(), strict=True))
        first = sum(a[0] == b[0] for a, b in zip(*answers.values(), strict=True))
        rates = {way: sum(map(len, answers[way])) / seconds[way] for way in ways}
        row = {"model": name, "batch": batch, "seconds": seconds, "tokens_a_second": rates}
        found.append({**row, "same_answers": same, "same_first": first})
        speeds = " ".join(f"{way} {rate:.0f}/s" for way, rate in rates.items())
        ratio = rates["logitwise"] / rates["generate"]
        print(f"{name}, batch {batch}: {speeds}, {ratio:.2f} times; {same} same, {first} in the first", flush=True)
    return found


def by_generate(model: PreTrainedModel, prompts: list[list[int]], ends: torch.Tensor, tokens: int) -> list[list[int]]:
    """Greedy answers by transformers, cut after the token that ends them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    stops = ends.tolist()
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=stops or None,
        pad_token_id=0,
    )
    found = []
    for row in out[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
        found.append(row[: end + 1])
    return found


if __name__ == "__main__":
    main()
