"""What every hostile input is given to: a reader that may refuse it, by one of our errors, or must read it whole."""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from quantized_files import write_model
from source_files import llama_config, random_model, save, tokenizer, write_gguf

from logitwise.calibration.jsonl import read_jsonl
from logitwise.calibration.prompts import prompts_of_file
from logitwise.calibration.text import read_text
from logitwise.errors import LogitwiseError
from logitwise.formats import FORMATS
from logitwise.grid import Grid
from logitwise.source import QuantizedSource, check_tokenizer, open_source, open_stored

HEADER = "header"
"""Stands for the JSON at the start of model.safetensors, whose length is then always right."""

FOLDER = (
    "config.json",
    "model.safetensors",
    HEADER,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
GRIDS = {"compressed-tensors": Grid(4, 32, True), "mlx": Grid(4, 32, False, torch.float32)}
QUANTIZED = ("gptq", "awq", "compressed-tensors", "mlx")


def read_model(model: Path, with_tokenizer: bool = True) -> bool:
    """Whether a model is read; every tensor must then have the shape that was said."""
    ways = (open_source, open_stored) if model.suffix == ".gguf" else (open_source,)
    try:
        for source in [way(model) for way in ways]:
            if with_tokenizer:
                # transformers adds a token to the small vocabulary of our file, beyond the embedding.
                source.tokenizer() if model.suffix == ".gguf" else check_tokenizer(source)
            for name in source.names():
                assert tuple(source.read(name).shape) == source.shape(name), name
                if isinstance(source, QuantizedSource) and (codes := source.quantized(name)) is not None:
                    assert tuple(codes.codes.shape) == source.shape(name), name
    except LogitwiseError as error:
        _check_message(error)
        return False
    return True


def read_texts(file: Path) -> bool:
    """Whether a file is read by every reader of text; each must give tokens or prompts then."""
    read: tuple[Callable[[Path], list[object]], ...] = (
        partial(read_jsonl, tokenizer=tokenizer()),
        partial(read_text, tokenizer=tokenizer()),
        prompts_of_file,
    )
    done = []
    for reader in read:
        try:
            assert isinstance(reader(file), list)
            done.append(True)
        except LogitwiseError as error:
            _check_message(error)
            done.append(False)
    return all(done)


def _check_message(error: LogitwiseError) -> None:
    assert error.what and error.why and error.remedy


class Victim:
    """A valid model whose files are replaced one at a time, and put back.

    Args:
        kind: `folder`, `gguf`, or a format.
        place: where it is made.
    """

    def __init__(self, kind: str, place: Path) -> None:
        self.kind, self.model = kind, place / kind
        if kind == "gguf":
            config = llama_config(vocab_size=300, num_hidden_layers=1)
            self.model = write_gguf(random_model(config), place / "tiny.gguf")
        elif kind == "folder":
            save(random_model(llama_config(num_hidden_layers=1)), self.model)
        else:
            form = FORMATS[kind]
            self.model.mkdir()
            write_model(form, GRIDS.get(kind, Grid(4, 32, False)), self.model)
            tokenizer().save_pretrained(self.model)
        self.parts = ("file",) if kind == "gguf" else tuple(part for part in FOLDER if self._file(part).exists())

    def _file(self, part: str) -> Path:
        if self.kind == "gguf":
            return self.model
        return self.model / ("model.safetensors" if part == HEADER else part)

    def content(self, part: str) -> bytes:
        """What a part holds."""
        content = self._file(part).read_bytes()
        return content[8 : 8 + struct.unpack_from("<Q", content)[0]] if part == HEADER else content

    def read_with(self, part: str, content: bytes) -> bool:
        """Whether the model is read with other content of one part."""
        file = self._file(part)
        before = file.read_bytes()
        if part == HEADER:
            length = struct.unpack_from("<Q", before)[0]
            content = struct.pack("<Q", len(content)) + content + before[8 + length :]
        file.write_bytes(content)
        try:
            return read_model(self.model, self.kind == "gguf" or part.startswith("token"))
        finally:
            file.write_bytes(before)
