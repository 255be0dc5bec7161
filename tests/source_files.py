"""Tiny models on disk: a safetensors folder and a GGUF file, written without logitwise."""

import string
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HEADS, KEY_HEADS = 4, 2
SPECIAL = ["<s>", "</s>", "<pad>"]
MERGES = [("t", "h"), ("th", "e"), ("a", "n")]
LETTERS = sorted({*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"})
TOKENS = [*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)]


def llama_config(**changes: object) -> LlamaConfig:
    """A Llama of two blocks; rows of 32 and 96 inputs, so that 32-wide GGUF blocks fit."""
    settings: dict[str, object] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    return LlamaConfig(**{**settings, **changes})


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of the config, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def decided_model(config: PretrainedConfig) -> PreTrainedModel:
    """The same with larger weights: its likeliest tokens are far from the others."""
    model = random_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def tokenizer(tokens: list[str] = TOKENS) -> PreTrainedTokenizerFast:
    """A byte-level BPE over ASCII."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)


def save(model: PreTrainedModel, folder: Path, shard_size: str = "1GB") -> Path:
    """The folder of a model with its tokenizer."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer().save_pretrained(folder)
    return folder


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored_name(name: str) -> str:
    """llama.cpp's name of a Llama parameter, by the list above."""
    module, _, suffix = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, block, rest = module.split(".", 3)
        return f"blk.{block}.{NAMES[rest]}.{suffix}"
    return f"{NAMES[module]}.{suffix}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key weight as llama.cpp keeps them: the two halves of each head take turns."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A Llama in a GGUF file: matrices in `kind`, norms in float32."""
    config = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # Long enough that the reader steps over it.
    tokens = [*TOKENS, *(f"<unused {i}>" for i in range(config.vocab_size - len(TOKENS)))]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleave(weight, HEADS if ".q_proj" in name else KEY_HEADS)
        kept = weight.ndim == 1 or kind == GGMLQuantizationType.F32
        if kept:
            writer.add_tensor(stored_name(name), weight)
        else:
            writer.add_tensor(stored_name(name), quantize(weight, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
