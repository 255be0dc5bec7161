"""Replies as servers write them, by hand."""

from typing import Any

from openai.types import Completion
from source_files import tokenizer

from logitwise.comparison.asking import as_tensors
from logitwise.comparison.replies import LEAST, Pieces, by_ids, by_texts

WORDS = tokenizer()
PIECES = Pieces(WORDS)
BOS = WORDS.bos_token_id
A, B, C, END = (WORDS.convert_tokens_to_ids(token) for token in ("a", "b", "c", "</s>"))


def reply(written: int = 1, **choice: Any) -> Completion:
    """As the client makes it, which checks nothing."""
    usage = {"prompt_tokens": 0, "completion_tokens": written, "total_tokens": 0}
    whole = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None, **choice}
    return Completion.construct(id="", object="text_completion", created=0, model="", choices=[whole], usage=usage)


def echoed(*entries: tuple[str, float | None, dict[str, float] | None], written: int = 0) -> Completion:
    tokens, own, top = ([entry[place] for entry in entries] for place in range(3))
    return reply(written, logprobs={"tokens": tokens, "token_logprobs": own, "top_logprobs": top})


def test_ids_name_the_tokens() -> None:
    said = [None, {str(B): {"logprob": -2.0}, str(C): {"logprob": -0.5}}, {str(C): {"logprob": float("-inf")}}]
    assert by_ids(reply(prompt_logprobs=said), [A, B, C]) == [[(C, -0.5), (B, -2.0)], [(C, LEAST)]]
    assert by_ids(reply(prompt_logprobs=said), [A, B]) is None, "as many as tokens were sent"
    assert by_ids(reply(prompt_logprobs=said), [A, B, B]) is None, "of the tokens that were sent"
    assert by_ids(reply(), [A, B]) is None


def test_texts_name_the_tokens_and_what_is_written_after_them_is_left() -> None:
    said = echoed(("a", None, None), ("b", -1.0, {"c": -0.6, "b": -1.0}), ("c", -0.1, {"c": -0.1}), written=1)
    assert by_texts(said, [A, B], PIECES, BOS) == [[(C, -0.6), (B, -1.0)]]
    assert by_texts(reply(), [A, B], PIECES, BOS) is None


def test_other_tokens_are_not_taken_for_those_that_were_sent() -> None:
    said = echoed(("a", None, None), ("b", -1.0, {"b": -1.0}))
    assert by_texts(said, [A, C], PIECES, BOS) is None
    assert by_texts(said, [A, B, C], PIECES, BOS) is None
    assert by_texts(said, [C, A, B], PIECES, BOS) is None, "the first is no BOS, which alone may be left out"


def test_a_bos_may_be_left_out_wherever_it_stands() -> None:
    said = echoed(("a", None, None), ("b", -1.0, {"b": -1.0}), ("c", -2.0, {"c": -2.0}))
    assert by_texts(said, [BOS, A, B, C], PIECES, BOS) == [None, [(B, -1.0)], [(C, -2.0)]]
    assert by_texts(said, [BOS, A, B, BOS, C], PIECES, BOS) == [None, [(B, -1.0)], None, [(C, -2.0)]]


def test_the_likeliest_is_not_guessed() -> None:
    """A special token shown as no text, as llama.cpp does, is not one of the vocabulary's texts."""
    said = echoed(("a", None, None), ("b", -2.0, {"": -0.3, "b": -2.0}), ("", -0.2, {"": -0.2, "a": -3.0}))
    assert by_texts(said, [A, B, END], PIECES, BOS) == [None, [(END, -0.2), (A, -3.0)]]


def test_texts_of_several_tokens_name_none() -> None:
    pieces = Pieces(WORDS)
    pieces.texts = [*PIECES.texts[:-1], "c"]
    said = echoed(("a", None, None), ("b", -0.5, {"b": -0.5, "c": -1.5}))
    assert by_texts(said, [A, B], pieces, BOS) == [[(B, -0.5)]]
    hidden = echoed(("a", None, None), ("b", -1.5, {"b": -1.5, "c": -9.0}))
    assert by_texts(hidden, [A, B], pieces, BOS) == [None], "another c, not shown, may have all that is left"
    assert by_texts(hidden, [A, B], PIECES, BOS) == [[(B, -1.5), (C, -9.0)]]
    assert pieces.same(A, "a")
    assert not pieces.same(A, "")


def test_parts_of_characters_may_be_left_out_of_a_text() -> None:
    """llama-cpp-python shows a token that is half a character and a comma as a comma."""
    pieces = Pieces(WORDS)
    pieces.texts = [*PIECES.texts[:-1], "\ufffdc"]
    assert "c" not in pieces.ids
    assert "\ufffdc" not in pieces.ids


def test_positions_as_tensors() -> None:
    found = as_tensors([[(C, -0.5), (B, -2.0)], None, [(A, -1.0)]])
    assert found.ids.tolist() == [[C, B], [-1, -1], [A, -1]]
    assert found.log_q.tolist() == [[-0.5, -2.0], [0, 0], [-1.0, 0]]
    assert found.told.tolist() == [True, False, True]
    assert found.only_told().ids.tolist() == [[C, B], [A, -1]]
