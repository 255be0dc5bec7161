"""Small random models with tokenizers, of which engines are asked, and the texts that they are asked about."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
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

from logitwise.formats import Described
from logitwise.formats.gguf_tokenizer import RULES

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
"""Teacher-forced in every engine; long enough that llama.cpp's rounding of activations averages out."""

TEXTS = [
    TEXT,
    "    def f(x):\n        return  x+12345 -  6\t\t# it's \"quoted\"  'twice'\n\n\n   end   ",
    "WE'VE 1 22 333 4444 55555, don't  we'LL  I'd; 10^3=1,000.00   -- ",
    "\u201cso\u201d na\u00efve caf\u00e9 \u4f60\u597d \u0663\u0664\u00b2 \U0001f642\r\n x",
    "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n 12<|im_end|><|endoftext|> and  <|endoftext|>",
]
"""Whose token ids an engine's own tokenizer must find too."""


@dataclass(frozen=True)
class Small:
    """A model in full precision: what a checkpoint tells of it, and its tensors by their parameters' names."""

    described: Described
    weights: dict[str, Tensor]


@cache
def llama() -> Small:
    """The model that every format is tried with."""
    return small("smollm", LlamaConfig(**_SHAPE))


def others() -> Iterator[Small]:
    """One of each other kind that a GGUF file tells, and tokenizers of each other rule that is written."""
    for rule, config in (
        ("gpt-2", LlamaConfig(**_SHAPE, tie_word_embeddings=True)),
        ("llama-bpe", LlamaConfig(**_SHAPE, attention_bias=True)),
        ("llama-bpe", LlamaConfig(**_SHAPE, head_dim=32)),
        ("smollm", MistralConfig(**_SHAPE, sliding_window=None)),
        ("qwen2", Qwen2Config(**_SHAPE)),
        ("qwen2", Qwen3Config(**_SHAPE, head_dim=32)),
    ):
        yield small(rule, config)


_SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},  # a reader's default would show
}


def small(rule: str, config: PretrainedConfig) -> Small:
    """Random weights, attention biases too, always the same; a tokenizer that splits text by a rule."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    weights = {name: one for name, one in model.state_dict().items() if name not in model.all_tied_weights_keys}
    weights |= {name: torch.randn_like(bias) / 2 for name, bias in weights.items() if name.endswith(".bias")}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    own = [key for key in ("attention_bias", "tie_word_embeddings") if getattr(config, key, False)]
    heads = [f"heads of {config.head_dim}"] if getattr(config, "head_dim", 64) == 32 else []
    name = " ".join(["random", config.model_type, *own, *heads, *([] if rule == "smollm" else [f"({rule})"])])
    return Small(Described(name, config, torch.float32, tokenizer(rule), linear), weights)


def tokenizer(name: str) -> PreTrainedTokenizerFast:
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
