"""Configs and paths that must be refused."""

import json
from pathlib import Path

import pytest
from source_files import llama_config, random_model, save
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from logitwise.errors import SourceError
from logitwise.source import open_source


def refusal(model: str | Path) -> str:
    with pytest.raises(SourceError) as refused:
        open_source(model)
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(llama_config()), tmp_path / "tiny")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("model", ["./missing", "missing/model.gguf", "/missing/model", "../a/b", "a/b/c"])
def test_missing_path(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(model)
    assert f"{model} does not exist" in message
    assert "no such folder and no such .gguf file, and it is no hub id" in message


def test_file_that_is_no_model(folder: Path):
    message = refusal(folder / "model.safetensors")
    assert "is not a model" in message
    assert "give the folder" in message


def test_folder_without_config(tmp_path: Path):
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(("content", "expected"), [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_config_that_is_none(folder: Path, content: str, expected: str):
    (folder / "config.json").write_text(content)
    assert f"config.json {expected}" in refusal(folder)


def test_config_that_wants_its_own_code(folder: Path):
    (folder / "own.py").write_text("raise RuntimeError('this code was run')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})
    message = refusal(folder)
    assert "architecture that is not supported: 'own'" in message
    assert "auto_map" in message
    assert "never runs" in message


def test_unknown_architecture(folder: Path):
    change_config(folder, model_type="unheard-of")
    message = refusal(folder)
    assert "not supported: 'unheard-of'" in message
    assert "does not know this model_type" in message


def test_config_with_impossible_values(folder: Path):
    change_config(folder, num_hidden_layers="many")
    assert "tiny" in refusal(folder)


def test_config_with_more_blocks_than_the_files_can_hold(folder: Path):
    """Building such a model, even without weights, would not end."""
    change_config(folder, num_hidden_layers=10**9)
    message = refusal(folder)
    assert "asks for 1000000000 blocks, the files hold 21 tensors" in message


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: BertForMaskedLM(
                BertConfig(
                    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
                )
            ),
            "BertForMaskedLM",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=8, num_layers=1)),
            "T5ForConditionalGeneration",
        ),
    ],
)
def test_not_a_causal_model(tmp_path: Path, model, expected: str):
    model().save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "is not a causal language model" in message
    assert expected in message
