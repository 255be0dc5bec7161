"""A tokenizer in a GGUF file: byte-level BPE, its rule of splitting text named as llama.cpp knows it.

llama.cpp has these rules in its own code, and a file only names one of them (`tokenizer.ggml.pre`). A wrong name gives
other token ids without a word, so only tokenizers whose own rule is one of these are written.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import PreTrainedTokenizerBase

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


RULES: dict[str, tuple[PreTokenizer, bool]] = {
    "gpt-2": (ByteLevel(add_prefix_space=False), False),
    "smollm": (Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), False),
    "qwen2": (_split(_WORDS % ""), False),
    "llama-bpe": (_split(_WORDS % "{1,3}"), True),
}
"""By llama.cpp's name: how text is split before it is merged, and whether words of the vocabulary skip the merges."""

SPECIAL = ("bos", "eos", "unk", "pad")


def not_described(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """None where llama.cpp would give the same token ids, else the reason why not."""
    spec = _specification(tokenizer)
    model = spec.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"its tokenizer is {_kind(spec)}; written are those of byte-level BPE"
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "its tokenizer's BPE has dropout, prefixes or suffixes, which llama.cpp's has not"
    # NFC (Qwen's) is passed over, as llama.cpp's own converter does: it changes only text that is not composed already.
    if (spec.get("normalizer") or {}).get("type", "NFC") != "NFC":
        return f"its tokenizer normalizes text ({spec['normalizer']['type']}), which llama.cpp does not"
    if _rule_of(spec) is None:
        known = ", ".join(RULES)
        return f"its tokenizer splits text by a rule that is none of those known by their names in llama.cpp ({known})"
    for added in spec["added_tokens"]:
        if any(added[key] for key in ("lstrip", "rstrip", "single_word")):
            return f"its token {added['content']} takes or needs blanks beside it, which llama.cpp does not know"
    if _around(tokenizer) is None:
        return "its tokenizer puts other tokens around a text than one at its start and one at its end"
    if tokenizer.eos_token_id is None:
        return "its tokenizer has no token that ends a text, and llama.cpp would take the eleventh for it"
    return None


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Adds the keys of a tokenizer that can be described.

    Args:
        writer: of the file.
        tokenizer: one that `not_described` has no word against.
        rows: of the embedding; ids without a token are filled.
    """
    spec = _specification(tokenizer)
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(_rule_of(spec)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    for name in SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    starts, ends = _around(tokenizer) or (False, False)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": one} for name, one in template.items()]
    if template:
        writer.add_chat_template(template)


def restore_rule(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Gives a tokenizer that was read from a file the rule that the file names; transformers knows only some."""
    if name in RULES:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer, backend.model.ignore_merges = RULES[name]


def _specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    return content


def _kind(spec: dict[str, Any]) -> str:
    kind = spec.get("model", {}).get("type", "not one of the tokenizers library")
    return f"{kind} with fallback to bytes" if spec.get("model", {}).get("byte_fallback") else str(kind)


def _rule_of(spec: dict[str, Any]) -> str | None:
    """llama.cpp's name of a tokenizer's rule."""
    own = _steps(spec.get("pre_tokenizer")), bool(spec["model"].get("ignore_merges"))
    for name, (rule, whole_words) in RULES.items():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = rule
        if own == (_steps(json.loads(backend.to_str())["pre_tokenizer"]), whole_words):
            return name
    return None


def _steps(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a rule, without what only matters to the offsets of tokens."""
    steps = (rule or {}).get("pretokenizers", [rule] if rule else [])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool] | None:
    """Whether a text is given the token that starts it, and the one that ends it; None for anything else."""
    bare, given = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for starts in (False, True):
        for ends in (False, True):
            if given == [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * ends:
                return starts, ends
    return None
