"""Calibration from files and data sets: what counts, and what is refused, by file and line."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitwise.calibration import datasets as datasets_module
from logitwise.calibration.datasets import read_datasets
from logitwise.calibration.jsonl import read_jsonl
from logitwise.calibration.rows import Document
from logitwise.calibration.text import read_text
from logitwise.errors import CalibrationError

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def counted(document: Document) -> str:
    return tokenizer().decode([i for i, counts in zip(document.ids, document.counts, strict=True) if counts])


def lines(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_text_passages_are_merged_into_documents_and_all_counts(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    passages = [f"passage {i} " + "x" * 140 for i in range(7)]
    path.write_text("\ufeff" + "\n \n\n".join(passages) + "\n", encoding="utf-8")
    documents = read_text(path, tokenizer())
    texts = [tokenizer().decode(document.ids) for document in documents]
    assert [text.count("passage") for text in texts] == [2, 2, 2, 1]
    assert "\n\n".join(texts) == "\n\n".join(passages)
    assert all(all(document.counts) for document in documents)


def test_plain_text_counts_whole(tmp_path: Path) -> None:
    first, second = read_jsonl(lines(tmp_path, {"text": "one"}, "", {"text": "two", "source": 3}), tokenizer(CHATML))
    assert (counted(first), counted(second)) == ("one", "two")
    assert all(first.counts)


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("question", "answer"), ("prompt", "text")])
def test_of_a_pair_only_the_second_counts_with_its_end(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = lines(tmp_path, {keys[0]: "What?", keys[1]: "Thät."})
    (plain,) = read_jsonl(path, tokenizer())
    assert tokenizer().decode(plain.ids) == "What?\nThät.</s>"
    assert counted(plain) == "Thät.</s>"
    (chat,) = read_jsonl(path, tokenizer(CHATML))
    assert tokenizer().decode(chat.ids) == "<s>user\nWhat?</s>\n<s>assistant\nThät.</s>\n"
    assert counted(chat) == "Thät.</s>"


def test_every_assistant_turn_counts(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two")]
    path = lines(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    (document,) = read_jsonl(path, tokenizer(CHATML))
    whole = "".join(f"<s>{role}\n{content}</s>\n" for role, content in turns)
    assert tokenizer().decode(document.ids) == whole
    assert counted(document) == "one</s>two</s>"


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LONGER = {"messages": CHAT["messages"] * 2}
FORGETFUL = "{% for m in messages %}{{ m['content'] if loop.last else 'x' }}{% endfor %}"
STRICT = "{{ raise_exception('no such role') }}"


@pytest.mark.parametrize(
    ("record", "template", "text"),
    [
        ("{broken", None, "line 2 is not JSON"),
        ("[1]", None, "line 2 is not a JSON object\n.*of type list"),
        ({"body": "x", "id": 1}, None, "line 2 has no known keys\n.*it has body, id\n.*text; prompt .*messages"),
        ({"prompt": "x"}, None, "line 2 has no known keys\n.*it has prompt"),
        ({"text": 5}, None, "line 2: text is not a text\n.*int"),
        ({"messages": [{"role": "user"}]}, CHATML, "line 2: message 1 cannot be read"),
        ({"messages": "hello"}, CHATML, "line 2: nothing in messages counts"),
        ({"messages": [{"role": "user", "content": "a"}]}, CHATML, "line 2: nothing in messages counts"),
        (CHAT, None, "line 2: the tokenizer has no chat template"),
        (LONGER, FORGETFUL, "line 2: the chat template does not show .*\n.*up to message 2 differently"),
        (CHAT, STRICT, "line 2: the chat template refuses the conversation\n.*no such role"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused(tmp_path: Path, record: object, template: str | None, text: str) -> None:
    path = lines(tmp_path, {"text": "fine"}, record)
    with pytest.raises(CalibrationError, match=r"lines\.jsonl, " + text):
        read_jsonl(path, tokenizer(template))


@pytest.mark.parametrize("read", [read_text, read_jsonl])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read\n.*no such file"),
        (b" \n\n", "is empty"),
        (b"GGUF\0\1", "is binary\n.*zero bytes"),
        (b"fine\nna\xefve", "is not UTF-8\n.*0xef in line 2"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, read: object, content: bytes | None, text: str) -> None:
    path = tmp_path / "input.file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"input\.file " + text):
        read(path, tokenizer())  # type: ignore[operator]
    with pytest.raises(CalibrationError, match=r"cannot be read\n.*it is a folder"):
        read(tmp_path, tokenizer())  # type: ignore[operator]


def test_a_data_set_is_read_until_there_is_enough(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    records = [{"prompt": f"q{i}", "completion": "yes"} for i in range(9)]
    lines(tmp_path, *records)
    documents = read_datasets(str(tmp_path), tokenizer(), 20)
    assert [counted(document) for document in documents] == ["yes</s>"] * 3
    lines(tmp_path, {"body": "x"})
    with pytest.raises(CalibrationError, match=r"train row 1 has no known keys\n.*it has body"):
        read_datasets(str(tmp_path), tokenizer(), 20)
    with pytest.raises(CalibrationError, match=f"data set {tmp_path}/none cannot be read"):
        read_datasets(f"{tmp_path}/none", tokenizer(), 20)


def test_without_the_package_a_data_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_module, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"not installed\n.*pip install datasets"):
        read_datasets("anything", tokenizer(), 20)
