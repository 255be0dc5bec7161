"""Configs and paths that must be refused."""

import json
from pathlib import Path

import pytest
import torch
from bounds import bounded
from source_files import llama_config, random_model, save, tokenizer
from transformers import BertConfig, BertForMaskedLM, Qwen2Config, T5Config, T5ForConditionalGeneration

from logitwise.calibration.chat import prompt_ids
from logitwise.errors import CalibrationError, SourceError
from logitwise.skeleton import Skeleton
from logitwise.source import check_tokenizer, open_source
from logitwise.source.outside import check_files


def refusal(model: str | Path) -> str:
    with bounded(), pytest.raises(SourceError) as refused:
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
    change_config(folder, num_hidden_layers=5000)
    message = refusal(folder)
    assert "asks for 5000 blocks, the files hold 21 tensors" in message


NUMBERS = [10**12, -1, 0, 1.5, float("nan"), "many", None, [1]]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"])
def test_sizes_that_no_model_has(folder: Path, key: str, value: object):
    change_config(folder, **{key: value})
    message = refusal(folder)
    assert "cannot be used" in message or "no model that can be built" in message or "has the wrong shape" in message
    assert "  do:   " in message


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
@pytest.mark.parametrize("value", [10**9, 10**12, float("inf"), float("nan")])
def test_counts_that_transformers_would_make_lists_of(folder: Path, key: str, value: float):
    """Qwen2's config has a list with an entry for each block, and every config one with an entry for each label."""
    Qwen2Config(vocab_size=40, hidden_size=32).save_pretrained(folder)
    change_config(folder, **{key: value})
    assert f"{key} is {value}\n  why:  no model has more than 10,000" in refusal(folder)


@pytest.mark.parametrize("value", [-1, 0])
def test_a_model_without_blocks(folder: Path, value: int):
    change_config(folder, num_hidden_layers=value)
    with pytest.raises(SourceError, match=r"no list of -1 blocks|cannot be replayed block by block"):
        Skeleton(open_source(folder), torch.device("cpu"), torch.float32).prove()


@pytest.mark.parametrize("content", [b'{"a":' * 100_000, b"[" * 100_000, b"\xff\xfe{", b'{"a":' + b"9" * 5000 + b"}"])
def test_json_that_cannot_be_parsed(folder: Path, content: bytes):
    (folder / "config.json").write_bytes(content)
    assert "config.json is not JSON" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json", "model.safetensors.index.json"])
def test_files_too_large_to_be_parsed(folder: Path, name: str):
    with (folder / name).open("ab") as file:
        file.truncate(10**10)  # no more than a length: nothing of it is on the disk
    assert f"{name} is too large\n  why:  it has 10000000000 bytes" in refusal(folder)


def test_weights_may_be_large_whatever_their_file_is_called(folder: Path):
    with (folder / "embed_tokens.safetensors").open("wb") as file:
        file.truncate(10**10)
    check_files(folder)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", ["llama"], "not supported: ['llama']"),
        ("model_type", {"a": 1}, "not supported: {'a': 1}"),
        ("architectures", 5, "architectures is 5\n  why:  it should be a list of names"),
        ("architectures", [{"a": 1}], "it should be a list of names"),
        ("quantization_config", 5, "config.json cannot be used"),
        ("quantization_config", {"quant_method": ["gptq"]}, "is quantized by ['gptq']"),
        ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("text_config", {"vision": [{"num_mtp_layers": 10**9}]}, "num_mtp_layers is 1000000000"),
        ("attention_types", [[["global", "local"], 10**9]], "attention_types is 1000000000"),
        ("text_config", 5, "no model that can be built"),
        ("dtype", "float99", "config.json cannot be used"),
        ("rope_parameters", {"rope_type": "unheard-of"}, "no model that can be built"),
    ],
)
def test_keys_of_another_kind(folder: Path, key: str, value: object, expected: str):
    change_config(folder, **{key: value})
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"eos_token_id": ["x"]}', "eos_token_id is ['x']"),
        ('{"eos_token_id": 1.5}', "eos_token_id is 1.5"),
        ('{"eos_token_id": 0, "cache_implementation": "unheard-of"}', "generation_config.json cannot be used"),
    ],
)
def test_generation_configs_that_cannot_be_used(folder: Path, content: str, expected: str):
    (folder / "generation_config.json").write_text(content)
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ '%99999999999d' % 1 }}", "MemoryError"),
        ("{{ 'ab' * 10000000 }}", "makes of a conversation is too long\n.*20000000 characters"),
    ],
)
def test_chat_templates_that_do_not_template(template: str, expected: str):
    made = tokenizer()
    made.chat_template = template
    with pytest.raises(CalibrationError, match=f"chat template (?s:.*){expected}"):
        prompt_ids(made, "the hen")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_code_on_the_hub_that_would_be_fetched_and_run(folder: Path, key: str):
    """transformers takes an attention of this form for a kernel to download."""
    change_config(folder, **{key: "someone/kernel:attention"})
    assert f"{key} is someone/kernel:attention\n  why:  it names code on the hub" in refusal(folder)


def test_code_beside_a_model_that_transformers_knows_is_not_run(folder: Path):
    """The model is read by the class of its type; a tokenizer that has only its own is refused."""
    code = "from pathlib import Path\n(Path(__file__).parent / 'was_run').touch()\n"
    for name in ("own.py", "configuration_own.py", "setup.py", "__init__.py"):
        (folder / name).write_text(code)
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(folder, auto_map=classes)
    source = open_source(folder)
    Skeleton(source, torch.device("cpu"), torch.float32).prove()
    assert source.tokenizer()("the")["input_ids"] == tokenizer()("the")["input_ids"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"no tokenizer that can be loaded\n.*contains custom code"):
        check_tokenizer(open_source(folder))
    assert not (folder / "was_run").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "extra/template.jinja"]
)
@pytest.mark.parametrize("target", ["../outside", "/dev/zero", "/etc/passwd", "/nowhere", "../tiny/../outside"])
def test_a_link_out_of_the_folder(folder: Path, name: str, target: str):
    """What it leads to would be carried into the checkpoint, which may then be published."""
    (folder.parent / "outside").write_text("a secret")
    (folder / "extra").mkdir()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path("..") / target if "/" in name and target.startswith(".") else target)
    message = refusal(folder)
    assert f"{folder / name} is a link out of the model's folder" in message
    assert "secret" not in message


def test_links_of_the_hubs_cache_and_inside_the_folder_are_followed(folder: Path):
    snapshot, blobs = folder.parent / "hub/snapshots/1234", folder.parent / "hub/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "LICENSE").symlink_to("config.json")
    (folder.parent / "link").symlink_to(snapshot)
    assert open_source(folder.parent / "link").names() == open_source(snapshot).names() != []


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
