"""A model in one GGUF file, as llama.cpp reads it. Names, permutations and config are by transformers' own tables."""

import struct
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter, ReaderField, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from logitwise.errors import SourceError
from logitwise.formats.gguf_file import FLOATS, OPTIONAL_BIASES
from logitwise.formats.gguf_tokenizer import restore_rule
from logitwise.source.base import Source
from logitwise.source.layout import layout_of
from logitwise.source.outside import found

LONG = 256


class GgufSource(Source):
    """A .gguf file, dequantized one tensor at a time.

    Tensors are read in float16: the values that the file stands for (its codes times its scales, in float32) rounded
    to float16. That rounded model is the full-precision model of everything that follows.

    Args:
        file: the file.
        folder: that which was given as the model, whose other files belong to it; None where the file itself was.

    Errors: SourceError where the file is truncated or corrupt, or its architecture or a tensor type is not supported.
    """

    def __init__(self, file: Path, folder: Path | None = None) -> None:
        self.file, self.folder = file, folder
        self.name = file.stem
        self.dtype = torch.float16
        reader = _open(file)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        _check_types(reader, file)
        self.architecture = architecture = str(reader.fields["general.architecture"].contents())
        self.config = _config(reader, architecture, file)
        self.config.dtype = self.dtype
        self.config.name_or_path = self.name  # else the outline's temporary folder
        self._layout = layout_of(self.config, len(self._tensors), file.name)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        rule = reader.fields.get("tokenizer.ggml.pre")
        self._rule = "" if rule is None else str(rule.contents())
        self._processor: TensorProcessor = processor(self.config.to_dict())  # type: ignore[no-untyped-call]
        # By the file's architecture: transformers takes a llama file called "mistral" for one, and has no such table.
        self._names: dict[str, str] = get_gguf_hf_weights_map(
            _TwoLevels(self._layout.model), self._processor, model_type=architecture
        )
        self._parts: dict[str, list[str]] = {}
        for stored in self._tensors:
            name = self._names.get(stored) or self._names.get(stored.removesuffix(".weight"))
            if name in self._layout.shapes:
                self._parts.setdefault(name, []).append(stored)
        self._layout.match(self._parts, file.name)
        for name, parts in self._parts.items():
            self._check_size(name, parts)

    def extra_files(self) -> list[Path]:
        return [] if self.folder is None else found(self.folder)

    def names(self) -> list[str]:
        """Every tensor of the model, in the order of the files."""
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, as the config says and the file was found to have."""
        return self._layout.shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized in float32 and rounded to float16."""
        tensor = self._loaded(name, self._dequantize)
        self._layout.check_shape(name, tuple(tensor.shape), self.file.name)
        return tensor.to(self.dtype)

    def _loaded(self, name: str, load: Callable[[ReaderTensor], np.ndarray]) -> Tensor:
        """A tensor in transformers' order, of what `load` gives of its parts in the file."""
        # Stacked experts are several tensors of the file; transformers collects those under "tensors" by itself.
        collected: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for stored in self._parts[name]:
            processed = self._processor.process(
                weights=load(self._tensors[stored]),
                name=stored,
                tensor_key_mapping=self._names,
                parsed_parameters=collected,
            )
            if processed.name is not None:
                collected["tensors"][name] = torch.from_numpy(np.ascontiguousarray(processed.weights))
        return collected["tensors"][name]

    @property
    def unused(self) -> list[str]:
        """Tensors of the files that the model has no place for."""
        placed = {stored for parts in self._parts.values() for stored in parts}
        return [stored for stored in self._tensors if stored not in placed]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the file; loaded once."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        # Not AutoTokenizer: it would parse the whole vocabulary once more to choose the class that is named here.
        try:
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                self.file.parent, gguf_file=self.file.name
            )
        except Exception as error:  # the tables in the file may be wrong in any way
            raise SourceError(
                f"{self.file.name} has no tokenizer that can be loaded",
                f"{type(error).__name__}: {error}",
                "use a GGUF file that holds its tokenizer, or the model's safetensors folder",
            ) from error
        restore_rule(tokenizer, self._rule)
        return tokenizer

    @property
    def size_bytes(self) -> int:
        """What the file takes on disk, in bytes."""
        return self.file.stat().st_size

    def _dequantize(self, tensor: ReaderTensor) -> np.ndarray:
        """The values of a tensor of the file, float32."""
        values: np.ndarray = dequantize(self._bytes(tensor).view(tensor.data.dtype), tensor.tensor_type)
        return values.astype(np.float32, copy=False)

    def _bytes(self, tensor: ReaderTensor) -> np.ndarray:
        """A tensor of the file as it is stored, uint8 [..., bytes of a row]; only its own bytes are read."""
        stored = np.fromfile(self.file, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
        return stored.reshape(*tensor.data.shape[:-1], -1)

    def _check_size(self, name: str, parts: list[str]) -> None:
        found = [tuple(int(n) for n in reversed(self._tensors[part].shape)) for part in parts]
        if sum(int(np.prod(shape)) for shape in found) != int(np.prod(self.shape(name))):
            self._layout.check_shape(name, found[0], self.file.name)


def holds_codes(file: Path) -> bool:
    """Whether a .gguf file has quantized tensors.

    Errors: SourceError where it cannot be read.
    """
    return any(tensor.tensor_type.name not in FLOATS.values() for tensor in _open(file).tensors)


class _TwoLevels:
    """A model as the name table asks about it, with its base model as the only child.

    transformers builds the table once more for every child it is told of: 400 times, or 12 seconds, for 30 blocks.
    Only the base model is needed: some files were written from that, without the prefix of the whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.state_dict, base = model.config, model.state_dict, model.base_model
        self._children: list[tuple[str, _TwoLevels]] = []
        if isinstance(base, PreTrainedModel) and base is not model:
            self._children.append((model.base_model_prefix, _TwoLevels(base)))

    def named_children(self) -> "list[tuple[str, _TwoLevels]]":
        return self._children


class _Reader(GGUFReader):
    """GGUFReader that steps over long arrays: splitting a vocabulary into its strings takes seconds."""

    def _get_field_parts(
        self, orig_offs: int, raw_type: int | np.uint32
    ) -> tuple[int, list[np.ndarray], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            if int(count[0]) > LONG:
                end = self._end_of_array(orig_offs + 12, GGUFValueType(kind[0]), int(count[0]))
                return end - orig_offs, [kind, count], [], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
        return super()._get_field_parts(orig_offs, int(raw_type))

    def _get_str(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        length, content = super()._get_str(offset)
        if len(content) != int(length[0]):
            raise ValueError(f"a string of {length[0]} bytes goes beyond the end")
        return length, content

    def _end_of_array(self, offset: int, kind: GGUFValueType, count: int) -> int:
        if kind != GGUFValueType.STRING:
            end = offset + count * int(np.dtype(self.gguf_scalar_to_np[kind]).itemsize)
            if end > self.data.size:
                raise ValueError(f"an array of {count} numbers goes beyond the end")
            return end
        length = struct.Struct("<Q" if self.endianess == GGUFEndian.LITTLE else ">Q")
        for _ in range(count):
            offset += 8 + length.unpack_from(self.data.data, offset)[0]
        return offset


def _open(file: Path) -> _Reader:
    try:
        reader = _Reader(file)
        if not isinstance(reader.fields["general.architecture"].contents(), str):
            raise ValueError("general.architecture is not a string")
    except Exception as error:  # the tables in the file may be wrong in any way
        raise SourceError(
            f"{file} cannot be read",
            f"it is not a GGUF file, or truncated or corrupt ({file.stat().st_size} bytes; {error})",
            "fetch the file again",
        ) from error
    return reader


def _check_types(reader: GGUFReader, file: Path) -> None:
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.tensor_type][1]), np.uint8), tensor.tensor_type)
        except NotImplementedError as error:
            raise SourceError(
                f"tensor {tensor.name} of {file.name} has type {tensor.tensor_type.name}",
                "the gguf package cannot turn that type into numbers",
                "use a file of another type (F16, Q8_0, Q4_K ...)",
            ) from error


def _config(reader: GGUFReader, architecture: str, file: Path) -> PretrainedConfig:
    """The config as transformers reads it from the file's keys and tensor names.

    transformers would walk the vocabulary for it (ten seconds), so it is shown an outline of the file: all its keys
    but the long arrays, and the names of its tensors without what is in them.
    """
    blocks, head_dim = (reader.fields.get(f"{architecture}.{key}") for key in ("block_count", "attention.key_length"))
    try:
        if blocks is not None and int(blocks.contents()) > len(reader.tensors):
            raise ValueError(f"it has {blocks.contents()} blocks, but {len(reader.tensors)} tensors")
        with tempfile.TemporaryDirectory() as folder:
            _write_outline(reader, architecture, Path(folder) / file.name)
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=file.name)
        # What transformers does not look for: the size of heads that is no share of the hidden size, and biases.
        if head_dim is not None and config.model_type == "qwen3":
            config.head_dim = int(head_dim.contents())
    except Exception as error:  # the keys of a file from outside may be wrong in any way
        raise SourceError(
            f"{file.name} has an architecture or keys that are not supported: {architecture}",
            f"{type(error).__name__}: {error}",
            "use the model's safetensors folder instead",
        ) from error
    _check_positions(reader, architecture, config, file)
    if architecture in OPTIONAL_BIASES:
        config.attention_bias = any(tensor.name.endswith(".attn_q.bias") for tensor in reader.tensors)
    return config


def _check_positions(reader: GGUFReader, architecture: str, config: PretrainedConfig, file: Path) -> None:
    """Refuses a file whose positions or windows transformers does not take over: it would be another model.

    Errors: SourceError.
    """

    def told(key: str) -> Any:
        field = reader.fields.get(f"{architecture}.{key}")
        return None if field is None else field.contents()

    window = told("attention.sliding_window")
    freqs = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    scaled = told("rope.scaling.type") not in (None, "none") and told("rope.scaling.factor") not in (None, 0.0, 1.0)
    why = None
    if scaled or told("rope.scale_linear") not in (None, 1.0) or not all(np.allclose(data, 1) for data in freqs):
        why = "its rotary embeddings are scaled, which transformers does not read from such a file"
    elif isinstance(window, int) and window not in (0, getattr(config, "sliding_window", None)):
        why = f"its attention has windows of {window} tokens, which transformers does not read from such a file"
    if why is not None:
        remedy = "use the model's safetensors folder instead"
        raise SourceError(f"{file.name} would be read as another model", why, remedy)


def _write_outline(reader: GGUFReader, architecture: str, file: Path) -> None:
    writer = GGUFWriter(file, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or _is_long(field):
            continue
        value: Any = field.contents()
        if value != []:
            writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    size, tokens = f"{architecture}.vocab_size", reader.fields.get("tokenizer.ggml.tokens")
    if size not in reader.fields and tokens is not None:
        writer.add_uint32(size, int(tokens.parts[4][0]))  # parts: key length, key, type, item type, count
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _is_long(field: ReaderField) -> bool:
    return field.types[0] == GGUFValueType.ARRAY and not field.data
