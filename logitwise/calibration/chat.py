"""Prompts and conversations as tokens, through the tokenizer's chat template where it has one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError

MOST_CHARACTERS = 1 << 22  # of a document, which is tokenized at once: about a million tokens

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


def check_length(text: str, place: str) -> None:
    """Errors: CalibrationError, naming the place, where a text is too long to be tokenized at once."""
    if len(text) > MOST_CHARACTERS:
        raise CalibrationError(
            f"{place} is too long",
            f"it has {len(text)} characters; at most {MOST_CHARACTERS} make one document",
            "break it into shorter ones",
        )


def templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, opened: bool) -> str:
    """A conversation as text; `opened`: up to where the assistant's next turn begins.

    Errors: CalibrationError where the tokenizer has no chat template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise CalibrationError(
            "the tokenizer has no chat template",
            "without one a conversation has no text",
            "give the lines as prompt and completion, or as plain text",
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
    except Exception as error:  # a template from outside may do anything that Jinja's sandbox allows
        why = str(error) or type(error).__name__
        remedy = "use the roles and the order that it knows"
        raise CalibrationError("the chat template refuses the conversation", why, remedy) from error
    check_length(str(text), "what the chat template makes of a conversation")
    return str(text)


def completed(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Document:
    """A prompt and its completion with the token that ends it; only the completion counts."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return conversation(tokenizer, turns)
    before = prompt_ids(tokenizer, prompt)
    after = text_ids(tokenizer, completion, special=False)
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return Document(before + after, [False] * len(before) + [True] * len(after))


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Document:
    """A conversation; what the assistant wrote counts, with the token that ends each of its turns.

    An assistant's turn is what the template adds between the conversation before it, opened for the assistant, and
    the conversation with it. White space that a template puts after the end token does not count.

    Errors: CalibrationError where a longer conversation is not templated to a continuation of a shorter one.
    """
    text = templated(tokenizer, messages, opened=False)
    turns: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            opened = templated(tokenizer, messages[:index], opened=True)
            closed = templated(tokenizer, messages[: index + 1], opened=False)
            if not (closed.startswith(opened) and text.startswith(closed)):
                raise CalibrationError(
                    "the chat template does not show what the assistant wrote",
                    f"it writes the conversation up to message {index + 1} differently when more follows",
                    "give the lines as prompt and completion, or as plain text",
                )
            turns.append((len(opened), max(len(opened), len(closed.rstrip()))))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = [any(begin <= start < end for begin, end in turns) for start, _ in encoded["offset_mapping"]]
    return Document(encoded["input_ids"], counts)
