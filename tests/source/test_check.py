"""Checks before any work: finite weights, a tokenizer that fits; the fingerprint of a model."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_files import TOKENS, llama_config, random_model, save, tokenizer

from logitwise.errors import SourceError
from logitwise.source import check_tokenizer, check_weights, fingerprint, open_source

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(llama_config()), tmp_path)


def test_fingerprint_is_the_hash_of_names_shapes_types_and_bytes(folder: Path):
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{name} {list(tensor.shape)} torch.float32\n".encode() + tensor.numpy().tobytes())
    seen: list[tuple[int, int]] = []
    source = open_source(folder)
    assert check_weights(source, lambda done, total: seen.append((done, total))) == digest.hexdigest()
    count = len(source.names())
    assert seen == [(i, count) for i in range(1, count + 1)]


def test_fingerprint_does_not_depend_on_the_files_and_depends_on_every_value(folder: Path, tmp_path: Path):
    before = check_weights(open_source(folder))
    sharded = save(random_model(llama_config()), tmp_path / "sharded", "20KB")
    assert check_weights(open_source(sharded)) == before
    change(folder, NORM, torch.full((32,), 1.0 + 2**-20))
    assert check_weights(open_source(folder)) != before


def change_json(name: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / name
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(found | changes))

    return change


@pytest.mark.parametrize(
    ("change", "other"),
    [
        (lambda folder: shutil.copy(folder / "config.json", folder / "LICENSE"), False),
        (change_json("config.json", transformers_version="1.0"), False),
        (change_json("config.json", rms_norm_eps=0.1), True),
        (change_json("tokenizer_config.json", chat_template="{{ messages }}"), True),
        (change_json("tokenizer_config.json", bos_token="a"), True),
        (change_json("generation_config.json", eos_token_id=7), True),
        (lambda folder: tokenizer([*TOKENS, "zz"]).save_pretrained(folder), True),
    ],
)
def test_what_else_of_a_model_decides_results(folder: Path, change: Callable[[Path], object], other: bool):
    before = fingerprint(open_source(folder), "weights")
    assert fingerprint(open_source(folder), "other weights") != before
    change(folder)
    assert (fingerprint(open_source(folder), "weights") != before) == other


@pytest.mark.parametrize("dtype", [torch.uint32, torch.complex64])
def test_parameters_of_a_kind_that_none_has(folder: Path, dtype: torch.dtype):
    change(folder, NORM, torch.ones(32).to(dtype))
    with pytest.raises(SourceError, match=f"{NORM} cannot be used\n.*stored as {str(dtype)[6:]}"):
        check_weights(open_source(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder: Path, value: float):
    tensor = torch.ones(32)
    tensor[[3, 30]] = value
    change(folder, NORM, tensor)
    with pytest.raises(SourceError) as refused:
        check_weights(open_source(folder))
    assert f"tensor {NORM} is not finite" in str(refused.value)
    assert "2 of its 32 values are NaN or infinity" in str(refused.value)


def test_tokenizer_that_fits(folder: Path):
    check_tokenizer(open_source(folder))


def test_tokenizer_with_ids_beyond_the_embedding(folder: Path):
    tokenizer([*TOKENS, "one", "two", "three"]).save_pretrained(folder)
    with pytest.raises(SourceError) as refused:
        check_tokenizer(open_source(folder))
    assert f"largest id is {len(TOKENS) + 2}, but the embedding has {len(TOKENS)} rows" in str(refused.value)


def test_no_tokenizer(folder: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(SourceError, match=r"no tokenizer that can be loaded"):
        check_tokenizer(open_source(folder))


def test_broken_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(SourceError, match=r"no tokenizer that can be loaded"):
        check_tokenizer(open_source(folder))


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})
