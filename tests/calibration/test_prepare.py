"""From a spec to rows: what is made of each kind, and what is refused."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from logitwise.calibration import Calibration, check_spec, fresh_rows, prepare
from logitwise.errors import CalibrationError


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a letter of English text; everything else is one unknown token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i for i in range(32, 127)} | {"\n": 127}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", **special)


def no_model() -> PreTrainedModel:
    raise AssertionError("files need no model")


def made(spec: str, **changes: Any) -> Calibration:
    options: dict[str, Any] = {"rows": 6, "held_out": 2, "row_tokens": 32, "seed": 0} | changes
    special = options.pop("special", {"bos_token": "<s>", "eos_token": "</s>"})
    return prepare(spec, tokenizer(**special), options.pop("model", no_model), **options)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": f"answer {i:02d}"}) for i in range(40)))
    return f"jsonl:{path}"


def test_rows_are_counted_and_held_out_text_is_its_own(pairs: str) -> None:
    found = made(pairs)
    assert (found.rows.ids.shape, found.held_out.ids.shape) == ((6, 32), (2, 32))
    total = sum(len(f"q{i}\nanswer {i:02d}") + 1 for i in range(40))
    assert found.counts == {
        "documents": 40,
        "tokens": total,
        "counted_tokens": found.rows.counted(),
        "rows": 6,
        "held_out_rows": 2,
    }
    assert 0 < found.rows.counted() < found.rows.ids.numel()
    plain = tokenizer()
    assert found.first_row_text == plain.decode(found.rows.ids[0].tolist())
    answers = [set(plain.decode(part.ids.flatten().tolist()).split("q")) for part in (found.rows, found.held_out)]
    complete = [{text for text in part if len(text.split("answer")[-1]) > 3} for part in answers]
    assert complete[0]
    assert complete[1]
    assert not complete[0] & complete[1]


def test_nothing_is_held_out_where_nothing_is_asked_for(pairs: str) -> None:
    found = made(pairs, held_out=0, rows=100)
    assert len(found.held_out) == 0
    assert found.held_out.ids.shape == (0, 32)
    assert found.counts["rows"] == len(found.rows) == (found.counts["tokens"] + 40 - 1) // 32


@pytest.mark.parametrize(
    ("special", "separator"),
    [({"bos_token": "<s>", "eos_token": "</s>"}, 1), ({"eos_token": "</s>"}, 2)],
)
def test_the_separator_begins_a_text_or_else_ends_it(tmp_path: Path, special: dict[str, str], separator: int) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abc"}) for _ in range(40)))
    found = made(f"jsonl:{path}", special=special, held_out=0)
    assert found.rows.ids[0, :5].tolist() == [97, 98, 99, separator, 97]


@pytest.mark.parametrize("file", [None, "prompts.txt"])
def test_the_models_own_text(tmp_path: Path, file: str | None) -> None:
    spec = "self"
    if file is not None:
        (tmp_path / file).write_text("\n".join("ab" * i for i in range(1, 30)))
        spec = f"self:{tmp_path / file}"
    model = tiny_model("llama")
    model.config.max_position_embeddings = 1000  # a prompt takes a token a letter
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"rows": 3, "held_out": 1, "row_tokens": 48, "model": lambda: model}
    found = made(spec, progress=lambda done, total: seen.append((done, total)), **options)
    assert (len(found.rows), len(found.held_out)) == (3, 1)
    assert seen[-1] == (288, 288)
    assert found.counts["tokens"] >= 288
    if file is not None:
        assert "ab" in found.first_row_text


def test_fresh_text_answers_no_prompt_that_is_held_out(tmp_path: Path) -> None:
    """Where those who choose are asked anew, a curve that falls on is what was learned by heart."""
    file, read = tmp_path / "prompts.txt", tokenizer(bos_token="<s>", eos_token="</s>")
    file.write_text("\n".join(f"{letter}{letter}" for letter in "abcdefgh"))
    model = tiny_model("llama")
    options: dict[str, Any] = {"row_tokens": 48, "model": lambda: model}
    held_out = made(f"self:{file}", rows=6, held_out=4, **options).held_out
    inside = {letter for letter in "abcdefgh" if held_out.hold(read(f"{letter}{letter}\n").input_ids)}
    assert inside
    assert inside != set("abcdefgh")
    fresh = fresh_rows(f"self:{file}", read, lambda: model, held_out, rows=3, row_tokens=48, seed=0)
    met = set()
    for rows in islice(fresh, 6):
        assert rows.ids.shape == (3, 48)
        met |= {letter for letter in "abcdefgh" if rows.hold(read(f"{letter}{letter}\n").input_ids)}
    assert met == set("abcdefgh") - inside
    file.write_text("\n".join(f"{letter}{letter}" for letter in inside))
    with pytest.raises(CalibrationError, match=r"no new text\n.*every prompt"):
        next(fresh_rows(f"self:{file}", read, lambda: model, held_out, rows=3, row_tokens=48, seed=0))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("books:x", "calibration 'books:x' is unknown\n.*self, self:FILE, server:URL, text:FILE, jsonl:FILE, hf:NAME"),
        ("text", "calibration 'text' lacks a file"),
        ("hf:", "calibration 'hf:' lacks a name"),
        ("self:", "calibration 'self:' lacks a file"),
        ("text:{tmp}/none", "none cannot be read\n.*no such file"),
        ("jsonl:{tmp}/none", "none cannot be read\n.*no such file"),
        ("self:{tmp}/none", "none cannot be read\n.*no such file"),
        ("self:{tmp}/empty", "empty is empty"),
        ("text:{tmp}/binary", "binary is binary"),
    ],
)
def test_a_spec_is_refused_before_any_work(tmp_path: Path, spec: str, text: str) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"a\0b")
    spec = spec.replace("{tmp}", str(tmp_path))
    with pytest.raises(CalibrationError, match=text):
        check_spec(spec)
    with pytest.raises(CalibrationError, match=text):
        made(spec)


def test_a_good_spec_is_not_refused(pairs: str) -> None:
    check_spec("self")
    check_spec(pairs)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 65)
    with pytest.raises(CalibrationError, match=r"65 calibration tokens are too few\n.*one row takes 32 .*held out"):
        made(f"text:{path}")
    path.write_text("x" * 66)
    found = made(f"text:{path}")
    assert (len(found.rows), len(found.held_out)) == (1, 1)


def test_text_of_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 200, "completion": "y"}))
    with pytest.raises(CalibrationError, match=r"no token of the calibration rows counts"):
        made(f"jsonl:{path}", held_out=0, rows=2)


def test_a_tokenizer_without_a_separator_is_refused(pairs: str) -> None:
    with pytest.raises(CalibrationError, match=r"the tokenizer has no separator"):
        made(pairs, special={})
