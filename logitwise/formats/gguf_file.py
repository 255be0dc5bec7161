"""The file of a GGUF checkpoint: names of tensors, order of rows, and the keys that describe a model.

Which config key is which key of the file is transformers' own table for reading such files, used the other way round;
names of tensors are the gguf package's. What a file does not tell, readers take for what it is by default: a model for
which that is wrong is refused.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

from logitwise.errors import FormatError
from logitwise.formats.base import Described
from logitwise.formats.checkpoint import writing
from logitwise.formats.gguf_tokenizer import add_tokenizer
from logitwise.formats.gguf_tokenizer import not_described as tokenizer_not_described

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of each architecture that is written, by transformers' model_type."""

INTERLEAVED = frozenset({"llama"})
"""Architectures whose rotary pairs are rows side by side; in transformers they lie half a head apart."""

OPTIONAL_BIASES = frozenset({"llama"})
"""Architectures whose attention has biases where the file has them."""

# Config keys that say nothing about what the model computes, or that the file tells in another way.
NEUTRAL_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_window_layers",  # read only where use_sliding_window is true, which is refused
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "tie_word_embeddings",  # the head is there or not
        "transformers_version",
        "use_cache",
    }
)
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def not_described(model: Described) -> str | None:
    """None where a file tells all of the model's config and its tokenizer, else the reason why not."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        return f"its architecture is {config.model_type}; written are {', '.join(ARCHITECTURES)}"
    architecture = ARCHITECTURES[config.model_type]
    given, read = config.to_dict(), _as_read(config, architecture).to_dict()
    for key in sorted(type(config)().to_dict().keys() - NEUTRAL_KEYS):
        if given.get(key) != read.get(key):
            return (
                f"its config has {key} {given.get(key)!r}, which a file of the architecture {architecture} does not "
                f"tell: it would be read as {read.get(key)!r}"
            )
    rows = config.vocab_size
    if (largest := max(model.tokenizer.get_vocab().values(), default=-1)) >= rows:
        return f"its tokenizer has a token {largest}, for which its embedding of {rows} rows has none"
    return tokenizer_not_described(model.tokenizer)


def file_of(model: Described) -> str:
    """The name of a model's file."""
    return f"{model.name.rpartition('/')[2]}.gguf"


def write_file(file: Path, tensors: Iterable[tuple[str, Tensor]], model: Described) -> int:
    """Writes a model into one file.

    Args:
        file: where to.
        tensors: parameters by their names; blocks, uint8 [out, bytes], by their module and type (`MODULE.Q4_0`).
        model: one that `not_described` has no word against.

    Returns: the size of the file, in bytes.
    Errors: FormatError for a tensor without a place in the file; MachineError where it cannot be written.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(MODEL_ARCH(number), model.config.num_hidden_layers)
    # Keys and the table of tensors come first in the file, so tensors wait in another until all are there.
    with writing(file), SpooledTemporaryFile(dir=str(file.parent)) as spool:
        writer = GGUFWriter(file, architecture, use_temp_file=True)
        writer.temp_file = spool
        kinds: Counter[str] = Counter()
        for name, tensor in tensors:
            module, _, suffix = name.rpartition(".")
            blocks = suffix in GGMLQuantizationType.__members__
            kind = suffix if blocks else FLOATS[tensor.dtype]
            place = names.get_name(f"{module}.weight" if blocks else name, try_suffixes=(".weight", ".bias"))
            if place is None:
                raise FormatError(
                    f"tensor {name} cannot be written", f"{architecture} has no place for it", "choose another --format"
                )
            content = in_file_order(place, tensor.detach().cpu(), model.config, architecture).contiguous()
            kinds[kind] += tensor.dim() > 1
            writer.add_tensor(place, content.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType[kind])
            del tensor, content  # before the next is there
        _add_keys(writer, model, architecture)
        most = max(kinds, key=lambda kind: kinds[kind])
        writer.add_file_type(LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
        add_tokenizer(writer, model.tokenizer, model.config.vocab_size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file.stat().st_size


def in_file_order(place: str, tensor: Tensor, config: PretrainedConfig, architecture: str) -> Tensor:
    """A tensor with its rows as llama.cpp wants them, whatever a row is made of."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(place.split(".")[-2])
    if architecture not in INTERLEAVED or heads is None:
        return tensor
    paired: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return paired.flatten(0, 2)


def _table(architecture: str) -> dict[str, str]:
    """Config keys by the file's keys, as transformers reads them; the rotary base has a place of its own."""
    tables: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    return {key: name for key, name in tables[architecture].items() if name is not None and name != "rope_theta"}


def head_dim(config: PretrainedConfig) -> int:
    """Channels of a head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _as_read(config: PretrainedConfig, architecture: str) -> PretrainedConfig:
    """The config that a reader makes of a file's keys."""
    told: dict[str, Any] = {name: getattr(config, name) for name in _table(architecture).values()}
    told["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    if hasattr(config, "head_dim"):
        told["head_dim"] = head_dim(config)
    if architecture in OPTIONAL_BIASES:
        told["attention_bias"] = getattr(config, "attention_bias", False)
    as_read: PretrainedConfig = CONFIG_MAPPING[architecture](**told)
    return as_read


def _add_keys(writer: GGUFWriter, model: Described, architecture: str) -> None:
    config = model.config
    values: dict[str, Any] = {key: getattr(config, name) for key, name in _table(architecture).items()}
    lengths = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    values |= dict.fromkeys(lengths, head_dim(config)) | {"rope.freq_base": float(config.rope_parameters["rope_theta"])}
    writer.add_name(model.name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in values.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
