"""Tiny models of odd sizes, and sources that hold them in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from logitwise.fit import Window
from logitwise.skeleton import Skeleton
from logitwise.source.base import Source

VOCABULARY = 131
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _config(kind: str, **changes: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, kind)(**{**_COMMON, **changes})


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("LlamaConfig", tie_word_embeddings=False),
    "llama-tied": _config("LlamaConfig", tie_word_embeddings=True),
    "llama-biased": _config("LlamaConfig", attention_bias=True, mlp_bias=True),
    "mistral": _config("MistralConfig", sliding_window=17),
    "qwen2": _config("Qwen2Config"),
    "qwen2-sliding": _config("Qwen2Config", use_sliding_window=True, sliding_window=19, max_window_layers=1),
    "qwen3": _config("Qwen3Config"),
    "gemma2": _config("Gemma2Config", sliding_window=15, query_pre_attn_scalar=16, final_logit_softcapping=3.0),
    "gemma3": _config("Gemma3TextConfig", sliding_window=15, query_pre_attn_scalar=16, sliding_window_pattern=2),
    "phi3": _config("Phi3Config"),
    "olmo2": _config("Olmo2Config"),
    "cohere": _config("CohereConfig", logit_scale=0.25),
    "granite": _config(
        "GraniteConfig", logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.2
    ),
    "gpt-neox": _config("GPTNeoXConfig", rotary_pct=0.25, tie_word_embeddings=False),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=96,
        word_embed_proj_dim=40,
        pad_token_id=0,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=6, n_positions=96),
    "smollm3": _config("SmolLM3Config"),
}


def tiny_model(family: str, seed: int = 0, scale: float = 4.0) -> PreTrainedModel:
    """A random model of the family whose parameters are all non-trivial: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Larger than the usual start, so that attention and the soft-caps are far from linear.
            parameter.copy_(noise * 0.02 * scale if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


class MemorySource(Source):
    """A model in memory as a source."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.name = type(model).__name__
        self.config = model.config
        self.dtype = torch.float32
        self.state = {name: p.detach() for name, p in model.named_parameters()}
        self.reads: list[str] = []
        self._tokenizer = tokenizer

    def names(self) -> list[str]:
        return list(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.state[name].clone()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state.values())


def last_block(skeleton: Skeleton, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, and what enters and leaves the last block of a tiny model in full precision."""
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))
    inputs, calls, last = skeleton.embed(ids), skeleton.calls(tokens), len(skeleton) - 1
    for block in range(last):
        Window(skeleton, range(block, block + 1), calls, lambda slot: False).advance(inputs, {}, 8)
    targets = inputs.clone()
    Window(skeleton, range(last, last + 1), calls, lambda slot: False).advance(targets, {}, 8)
    return ids, inputs, targets


def assert_finite_differences(parameter: Tensor, value: Callable[[], float], step: float = 1e-6) -> None:
    """The gradient of a float64 parameter is that of `value` by central differences, element by element."""
    assert parameter.grad is not None
    flat, slopes = parameter.data.view(-1), parameter.grad.view(-1)
    for index in range(len(flat)):
        kept = float(flat[index])
        flat[index] = kept + step
        above = value()
        flat[index] = kept - step
        below = value()
        flat[index] = kept
        assert float(slopes[index]) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)
