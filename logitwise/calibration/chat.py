"""Prompts and conversations as tokens, through the tokenizer's chat template where it has one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError

Message = dict[str, str]
"""One turn: `role` and `content`."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """What a model reads before it answers: the templated user message, or the plain prompt and a newline."""
    if not tokenizer.chat_template:
        return text_ids(tokenizer, prompt + "\n", special=True)
    # The template writes the special tokens itself, a BOS among them.
    return text_ids(tokenizer, templated(tokenizer, [{"role": "user", "content": prompt}], opened=True), special=False)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """The tokens of a text; `special`: with those the tokenizer puts around a text."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, opened: bool) -> str:
    """A conversation as text; `opened`: up to where the assistant's next turn begins."""
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
    return text


def completed(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Document:
    """A prompt and its completion with the token that ends it; only the completion counts."""
    if tokenizer.chat_template:
        return conversation(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    before = prompt_ids(tokenizer, prompt)
    after = text_ids(tokenizer, completion, special=False)
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return Document(before + after, [False] * len(before) + [True] * len(after))


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Document:
    """A conversation; what the assistant wrote counts, with the token that ends each of its turns.

    An assistant's turn is what the template adds between the conversation before it, opened for the assistant, and
    the conversation with it. White space that a template puts after the end token does not count.

    Errors: CalibrationError where the template does not write a longer conversation as a continuation of a shorter.
    """
    ids: list[int] = []
    counts: list[bool] = []
    written = ""

    def add(text: str, counted: bool) -> None:
        new = text_ids(tokenizer, text, special=False) if text else []
        ids.extend(new)
        counts.extend([counted] * len(new))

    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = templated(tokenizer, messages[:index], opened=True)
        closed = templated(tokenizer, messages[: index + 1], opened=False)
        if not (opened.startswith(written) and closed.startswith(opened)):
            raise CalibrationError(
                "the chat template cannot tell what the assistant wrote",
                f"with message {index + 1} it writes the messages before it differently",
                "give the lines as prompt and completion, or as plain text",
            )
        turn = closed[len(opened) :]
        end = turn.rstrip()
        add(opened[len(written) :], False)
        add(end, True)
        # What follows the end token belongs to the text before the next turn.
        written = opened + end
    whole = templated(tokenizer, messages, opened=False)
    add(whole[len(written) :], False)
    return Document(ids, counts)
