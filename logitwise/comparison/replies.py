"""The log-probabilities of a prompt's tokens as servers write them, read as token ids.

`prompt_logprobs` (vLLM) names tokens by their ids. The older `echo` names them by their texts, which several tokens may
share: a text counts where it is that of one token alone, and the others are among those not named.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.chat import text_ids

if TYPE_CHECKING:
    from openai.types import Completion

Named = list[tuple[int, float]]
"""The tokens named at a position with their log-probabilities, the likeliest first."""

LEAST = -9999.0
"""For a probability of 0, as vLLM writes it."""


class Pieces:
    """The text of each token, as it stands inside a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def texts(self) -> list[str]:
        """By token id; after a letter, since some tokenizers drop a space at the start of a text."""
        before = text_ids(self.tokenizer, "a", special=False)
        skipped = len(str(self.tokenizer.decode(before)))
        pairs = [[*before, token] for token in range(len(self.tokenizer))]
        return [text[skipped:] for text in self.tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Of the texts that one token alone has, also where a server leaves out parts of a character."""
        count = Counter(text.replace("\ufffd", "") for text in self.texts)
        return {text: token for token, text in enumerate(self.texts) if count[text] == 1}

    def same(self, token: int, text: str) -> bool:
        """Whether a server's text can be that of a token: special ones may be left out, parts of a character differ."""
        own = self.texts[token]
        return own == text or "\ufffd" in own or (not text and token in self.tokenizer.all_special_ids)


def by_ids(reply: "Completion", ids: Sequence[int]) -> list[Named | None] | None:
    """What is said of each token of a prompt but the first, from `prompt_logprobs`; None where it is not there."""
    found = (reply.choices[0].model_extra or {}).get("prompt_logprobs")
    if not found or len(found) != len(ids):
        return None
    named: list[Named | None] = []
    for token, said in zip(ids[1:], found[1:], strict=True):
        named.append(_likeliest_first({int(key): _finite(value["logprob"]) for key, value in said.items()}))
        if token not in dict(named[-1] or ()):
            return None
    return named


def by_texts(reply: "Completion", ids: Sequence[int], pieces: Pieces, bos: int | None) -> list[Named | None] | None:
    """The same from `echo`; None where it is not there, or the prompt's tokens are others on the server.

    A position is None where the likeliest token cannot be told, because its text is that of other tokens too.
    """
    said = reply.choices[0].logprobs
    if said is None or not said.tokens or not said.token_logprobs or not said.top_logprobs:
        return None
    written = reply.usage.completion_tokens if reply.usage else 1
    echoed = list(zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=False))
    echoed = echoed[: len(said.tokens) - written]
    shown = [token for token in ids if token != bos]
    if len(echoed) == len(ids):
        shown, echoed = list(ids[1:]), echoed[1:]
    elif len(echoed) != len(shown) or ids[0] != bos:  # llama-cpp-python leaves out every BOS, where one comes first
        return None
    if not all(pieces.same(token, text) for token, (text, *_) in zip(shown, echoed, strict=True)):
        return None
    named = [_named(token, value, top, pieces) for token, (_, value, top) in zip(shown, echoed, strict=True)]
    if len(named) == len(ids) - 1:
        return named
    waiting = iter(named)
    return [None if token == bos else next(waiting) for token in ids[1:]]


def _named(token: int, value: float | None, top: dict[str, float] | None, pieces: Pieces) -> Named | None:
    """One position, from the texts of its likeliest tokens and the log-probability of the token that is there.

    Of tokens with one text a server gives one alone, not always the likeliest; but none has more than what is left.
    """
    if value is None or top is None:
        return None
    value = _finite(value)
    named = {pieces.ids[text]: _finite(said) for text, said in top.items() if text in pieces.ids}
    ranked = _likeliest_first({**named, token: value})
    left = 1 - sum(math.exp(said) for _, said in ranked)
    hidden = any(text not in pieces.ids for text in top)
    return None if hidden and math.exp(ranked[0][1]) < left else ranked


def _likeliest_first(named: dict[int, float]) -> Named:
    return sorted(named.items(), key=lambda entry: -entry[1])


def _finite(value: float) -> float:
    return max(value, LEAST) if math.isfinite(value) else LEAST
