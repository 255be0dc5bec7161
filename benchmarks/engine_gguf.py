"""Loads GGUF files by llama.cpp and compares its log-probabilities and token ids with those of transformers.

Run it with logitwise's Python; --python names that of an environment with llama-cpp-python, which needs no torch.
Models are folders in full precision; without any, tiny random ones of every architecture and with tokenizers of every
rule that is written.
Each is rounded to nearest on several grids and written: as blocks, and dequantized in float32. llama.cpp rounds
activations to 8 bits where it multiplies by blocks, so that blocks are judged by means, and float32 files by the
largest difference. Files whose queries and keys have their rows in another order, and files whose zero points are off
by one, must miss.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from logitwise.formats import FORMATS, Described
from logitwise.formats.gguf_file import file_of, head_dim
from logitwise.formats.gguf_tokenizer import RULES
from logitwise.grid import Grid, Quantized, codes_of, freeze, scale_of_range, split
from logitwise.source import open_source

FORMAT = FORMATS["gguf"]
LARGEST, MEAN, NLL = 1e-4, 0.3, 0.03
WRONG = Grid(4, 64, False)
GRIDS = [Grid(3, 32, False), Grid(4, 32, True), WRONG, Grid(8, None, True)]
TEXT = (
    "The tides follow the moon. Twice a day the sea comes up the beach, and twice it goes back, because the Moon pulls "
    "at the water of 7 oceans, 365 days of the year; nobody's house at the shore stands still for it, and we've known "
    "this for a long time. The water on the side of the Earth that faces the Moon is pulled the most, and so it rises "
    "there. On the far side it rises too, since the Earth itself is pulled away from the water. Between the two the "
    "water is low. As the Earth turns, each beach passes through both of the high places in a little more than a day. "
    "The Sun does the same, but it is so far away that its pull is only about half as strong. When the Sun and the "
    "Moon are in one line, at the new moon and at the full moon, the two add up and the tide is higher than at other "
    "times. Fishermen have tables in which they find the hour of high water for every port, and they plan their day "
    "by them.\n"
)
TEXTS = [
    TEXT,
    "    def f(x):\n        return  x+12345 -  6\t\t# it's \"quoted\"  'twice'\n\n\n   end   ",
    "WE'VE 1 22 333 4444 55555, don't  we'LL  I'd; 10^3=1,000.00   -- ",
    "\u201cso\u201d na\u00efve caf\u00e9 \u4f60\u597d \u0663\u0664\u00b2 \U0001f642\r\n x",
    "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n 12<|im_end|><|endoftext|> and  <|endoftext|>",
]
BY_LLAMA = """
import json, sys
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

for line in sys.stdin:
    asked = json.loads(line)
    model = Llama(asked["file"], n_ctx=512, n_batch=512, n_threads=2, logits_all=True, verbose=False,
                  type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    ids = asked["ids"]
    model.reset()
    model.eval(ids)
    logits = model.scores[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = chances[np.arange(len(ids) - 1), ids[1:]].tolist()
    texts = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    print(json.dumps({"found": found, "texts": texts}), flush=True)
    model.close()
"""
Weights = dict[str, Tensor | Quantized]


@dataclass(frozen=True)
class Case:
    """A file to load.

    Args:
        name: what it is.
        stored: what is written into it.
        meant: what transformers computes with.
        exact: whether the largest difference is judged, or the means.
        right: whether it must meet the gate, or miss it.
    """

    name: str
    stored: Weights
    meant: Weights
    exact: bool
    right: bool = True


def main() -> None:
    """Prints one line of JSON for each file; exits with 1 where one misses its gate, or a wrong one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that holds llama-cpp-python")
    parser.add_argument("models", type=Path, nargs="*")
    given = parser.parse_args()
    failed = False
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [given.python, "-c", BY_LLAMA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as engine,
    ):
        assert engine.stdin is not None
        assert engine.stdout is not None
        for described, weights in map(opened, given.models) if given.models else tiny():
            ids = described.tokenizer(TEXT).input_ids
            texts = [described.tokenizer(text).input_ids for text in TEXTS]
            for case in cases(weights, described.config):
                FORMAT.write(Path(folder), stored(case.stored), described, {})
                asked = {"file": str(Path(folder) / file_of(described)), "ids": ids, "texts": TEXTS}
                engine.stdin.write(json.dumps(asked) + "\n")
                engine.stdin.flush()
                answer = engine.stdout.readline()
                if not answer:
                    raise SystemExit(f"llama.cpp failed on {described.name}, {case.name}")
                loaded = json.loads(answer)
                ours = by_transformers(described.config, case.meant, ids)
                difference = torch.tensor(loaded["found"]) - ours
                figures = {
                    "largest": float(difference.abs().max()),
                    "mean": float(difference.abs().mean()),
                    "nll_difference": -float(difference.mean()),
                    "nll": -float(ours.mean()),
                }
                if case.exact:
                    meets = figures["largest"] <= LARGEST
                else:
                    meets = figures["mean"] <= MEAN and abs(figures["nll_difference"]) <= NLL
                failed |= meets is not case.right or loaded["texts"] != texts
                same = sum(a == b for a, b in zip(loaded["texts"], texts, strict=True))
                line = {"model": described.name, "file": case.name, "meets": meets, "must": case.right}
                print(
                    json.dumps(line | {"tokens": len(ours), "same_ids": f"{same} of {len(texts)}"} | figures),
                    flush=True,
                )
        engine.stdin.close()
    raise SystemExit(int(failed))


def cases(weights: dict[str, Tensor], config: PretrainedConfig) -> Iterator[Case]:
    """The files of a model, rounded to nearest on each grid."""
    for grid in GRIDS:
        on_grid: Weights = {
            name: rounded(weight, grid) if name.endswith("_proj.weight") else weight for name, weight in weights.items()
        }
        dense: Weights = {name: values(weight) for name, weight in on_grid.items()}
        yield Case(f"{grid}: blocks", on_grid, on_grid, exact=False)
        yield Case(f"{grid}: float32", dense, on_grid, exact=True)
        if grid is WRONG:
            moved = {name: off_by_one(weight) for name, weight in on_grid.items()}
            yield Case("zero points off by one", moved, on_grid, exact=False, right=False)
            undone: Weights = {name: reordered(name, values(weight), config) for name, weight in on_grid.items()}
            yield Case("queries and keys in another order", undone, on_grid, exact=True, right=False)


def rounded(weight: Tensor, grid: Grid) -> Quantized:
    """Nearest codes of a weight, its range the whole of each group."""
    grouped = split(weight, grid.groups(weight.shape[1]))
    scale, zero = scale_of_range(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), grid)
    return freeze(codes_of(weight, scale, zero, grid), scale, zero, grid)


def values(weight: Tensor | Quantized) -> Tensor:
    """A weight in float32."""
    return weight.dequantize() if isinstance(weight, Quantized) else weight


def off_by_one(weight: Tensor | Quantized) -> Tensor | Quantized:
    """A weight with every zero point but the largest moved by one."""
    if not isinstance(weight, Quantized):
        return weight
    return replace(weight, zero=weight.zero.clamp(max=weight.grid.levels - 1) + 1)


def reordered(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """A query or key in such an order that, of a Llama, it is written as transformers has it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def stored(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file."""
    for name, weight in weights.items():
        if isinstance(weight, Quantized):
            yield from FORMAT.tensors(name.removesuffix(".weight"), weight).items()
        else:
            yield name, weight


@torch.no_grad()
def by_transformers(config: PretrainedConfig, weights: Weights, ids: list[int]) -> Tensor:
    """Log-probabilities of each token after the first, in float32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({name: values(one) for name, one in weights.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


def opened(folder: Path) -> tuple[Described, dict[str, Tensor]]:
    """A model on disk, in float32."""
    source = open_source(folder)
    described = Described(source.name, source.config, torch.float32, source.tokenizer(), [])
    return checked(described), {name: source.read(name).float() for name in source.names()}


def tiny() -> Iterator[tuple[Described, dict[str, Tensor]]]:
    """Random models of each architecture, with a tokenizer of each rule among them."""
    shape: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},  # a reader's default would show
    }
    for rule, config in (
        ("gpt-2", LlamaConfig(**shape)),
        ("smollm", LlamaConfig(**shape, tie_word_embeddings=True)),
        ("llama-bpe", LlamaConfig(**shape, attention_bias=True)),
        ("llama-bpe", LlamaConfig(**shape, head_dim=32)),
        ("smollm", MistralConfig(**shape, sliding_window=None)),
        ("qwen2", Qwen2Config(**shape)),
        ("qwen2", Qwen3Config(**shape, head_dim=32)),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        state = {name: one for name, one in model.state_dict().items() if name not in model.all_tied_weights_keys}
        state |= {name: torch.randn_like(bias) / 2 for name, bias in state.items() if name.endswith(".bias")}
        own = [key for key in ("attention_bias", "tie_word_embeddings") if getattr(config, key, False)]
        name = f"{config.model_type}, {rule}, heads of {head_dim(config)}, {' '.join(own) or 'plain'}"
        yield checked(Described(name, config, torch.float32, trained(rule), [])), state


def trained(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits text by a rule, trained on this file."""
    rule, whole_words = RULES[name]
    backend = Backend(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = rule, decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text("utf-8"), *TEXTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[2])


def checked(described: Described) -> Described:
    """The same, where it can be written."""
    reason = FORMAT.holds_model(described)
    if reason is not None:
        raise SystemExit(f"{described.name}: {reason}")
    return described


if __name__ == "__main__":
    main()
