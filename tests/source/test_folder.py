"""Safetensors folders: names, types and files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save
from transformers import GPT2Config

from logitwise.errors import SourceError
from logitwise.source import FolderSource, open_source


@pytest.mark.parametrize(("tied", "shard_size"), [(False, "1GB"), (True, "1GB"), (False, "20KB")])
def test_every_tensor_as_saved(tmp_path: Path, tied: bool, shard_size: str):
    model = random_model(llama_config(tie_word_embeddings=tied))
    source = open_source(save(model, tmp_path / "tiny", shard_size))
    expected = dict(model.state_dict())
    if tied:
        del expected["lm_head.weight"]
    assert source.name == "tiny"
    assert source.dtype == torch.float32
    assert source.unused == []
    assert sorted(source.names()) == sorted(expected)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    assert all(source.shape(name) == tuple(tensor.shape) for name, tensor in expected.items())
    files = list((tmp_path / "tiny").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "20KB")
    assert source.size_bytes == sum(file.stat().st_size for file in files)
    assert source.tokenizer()("the").input_ids == [source.tokenizer().get_vocab()["the"]]


def test_names_are_in_the_order_of_the_files(tmp_path: Path):
    folder = save(random_model(llama_config()), tmp_path, "20KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    places = [weight_map[name] for name in open_source(folder).names()]
    assert places == sorted(places)


def test_config_type_wins_over_file_type(tmp_path: Path):
    model = random_model(llama_config())
    source = open_source(save(model, tmp_path))
    change_config(tmp_path, dtype="bfloat16")
    again = open_source(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.read(name), source.read(name).bfloat16())
    change_config(tmp_path, dtype=None)
    assert open_source(tmp_path).dtype == torch.float32


def test_base_model_names_masks_and_tied_head(tmp_path: Path):
    """As the first GPT-2 files are: no `transformer.` prefix, attention masks among the weights."""
    model = random_model(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=16))
    save(model, tmp_path)
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_weights(tmp_path).items()}
    stored |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8) for i in range(2)}
    assert "wte.weight" in stored
    assert "lm_head.weight" not in stored
    save_weights(tmp_path, stored)
    source = open_source(tmp_path)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert sorted(source.names()) == sorted(expected)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    assert source.unused == ["h.0.attn.bias", "h.1.attn.bias"]


def test_prefix_too_many(tmp_path: Path):
    """A base model's name before a tensor that stands outside it."""
    model = random_model(llama_config())
    save(model, tmp_path)
    stored = load_weights(tmp_path)
    stored["model.lm_head.weight"] = stored.pop("lm_head.weight")
    save_weights(tmp_path, stored)
    assert torch.equal(open_source(tmp_path).read("lm_head.weight"), model.state_dict()["lm_head.weight"])


def test_tied_head_stored_all_the_same(tmp_path: Path):
    model = random_model(llama_config(tie_word_embeddings=True))
    save(model, tmp_path)
    stored = load_weights(tmp_path)
    embedding = stored["model.embed_tokens.weight"]
    save_weights(tmp_path, stored | {"lm_head.weight": embedding.clone()})
    source = open_source(tmp_path)
    assert "lm_head.weight" not in source.names()
    assert source.unused == ["lm_head.weight"]

    save_weights(tmp_path, stored | {"lm_head.weight": embedding + 1})
    with pytest.raises(SourceError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        open_source(tmp_path)

    del stored["model.embed_tokens.weight"]
    save_weights(tmp_path, stored | {"lm_head.weight": embedding})
    assert torch.equal(open_source(tmp_path).read("model.embed_tokens.weight"), embedding)


def test_read_is_a_copy(tmp_path: Path):
    source = open_source(save(random_model(llama_config()), tmp_path))
    source.read("model.norm.weight").zero_()
    assert bool((source.read("model.norm.weight") == 1).all())


def test_raw_access(tmp_path: Path):
    model = random_model(llama_config())
    save(model, tmp_path)
    change_config(tmp_path, dtype="float16")
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    assert source.quantization_config is None
    assert sorted(source.raw_names()) == sorted(model.state_dict())
    assert source.raw("model.norm.weight").dtype == torch.float32


def test_files_carried_over(tmp_path: Path):
    save(random_model(llama_config()), tmp_path)
    for name in ("LICENSE.txt", "NOTICE", "README.md"):
        (tmp_path / name).write_text("text")
    names = [file.name for file in open_source(tmp_path).extra_files()]
    assert names == ["LICENSE.txt", "NOTICE", "generation_config.json"]


def test_native_class_is_used_where_the_config_also_names_code(tmp_path: Path):
    """Models whose code has since become part of transformers still carry auto_map; theirs is not run."""
    save(random_model(llama_config()), tmp_path)
    (tmp_path / "own.py").write_text("raise RuntimeError('this code was run')")
    change_config(tmp_path, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert "lm_head.weight" in open_source(tmp_path).names()


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_weights(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_memory_that_is_not_enough_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source(save(random_model(llama_config()), tmp_path))

    class Starved:
        def __init__(self, *given: object, **more: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("logitwise.source.shards.safe_open", Starved)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        source.read(source.names()[0])
