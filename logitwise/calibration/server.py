"""The full-precision model's answers from a server that speaks OpenAI's protocol: for models too large to run here.

Prompts go out as token ids, so that the server's template plays no part. An answer comes back as token ids where the
server says them, else as text, which is tokenized here; where it ended by itself, the token that ends an answer is put
after it, unless it is there.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.batches import Keep, answers_of, keep_nothing
from logitwise.calibration.chat import prompt_ids, text_ids
from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError, MachineError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Model

SEE_TO_IT = "see to the server and run the same command again"

UNPENALIZED = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
SETTINGS: tuple[dict[str, Any], ...] = (
    {**UNPENALIZED, "top_k": 0, "min_p": 0.0, "return_token_ids": True},
    UNPENALIZED,
    {},
)
"""Beyond OpenAI's own, the first that a server takes. Without them engines apply defaults that no other model here
gets: vLLM those of generation_config.json, llama-cpp-python a penalty of 1.1 on what was written before. vLLM says
answers as token ids if asked to."""

AT_ONCE = 32
"""Requests under way at a time; the server batches them."""


def served_model(url: str) -> str:
    """The name of the model that a server serves first.

    Errors: CalibrationError where the client is not installed, or no server answers.
    """
    return served_models(url)[0].id


def served_models(url: str) -> "list[Model]":
    """What a server serves, one model at the least.

    Errors: CalibrationError where the client is not installed, no server answers, or it serves nothing.
    """
    client = client_of(url)
    from openai import OpenAIError

    why = "it serves no model"
    try:
        if models := list(client.models.list()):
            return models
    except (OpenAIError, AttributeError, TypeError, ValueError) as error:  # the last three: a page that is no list
        why = str(error)
    raise CalibrationError(
        f"the server at {url} does not answer",
        why,
        "start it, and give the address that ends in /v1, such as http://localhost:8000/v1",
    )


def ask_answers(
    url: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int,
    answer_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = keep_nothing,
) -> list[Document]:
    """Documents of a prompt and the server's answer to it; only the answer counts, its end token included.

    Args:
        url: the server's address, up to /v1.
        prompts: taken in order, each at most once, until `tokens` tokens are there or no prompt is left.
        tokens: how many are wanted, prompts included.
        answer_tokens: the longest answer.
        temperature: of the sampling.
        seed: of the sampling, where the server heeds it.
        progress: called with the tokens there and `tokens`.
        keep: where answers are kept, as many at a time as are asked at once.

    Errors: MachineError where the server stops answering.
    """
    client, model = client_of(url), served_model(url)
    from openai import APIStatusError, OpenAIError

    manner: dict[str, Any] = {"model": model, "max_tokens": answer_tokens, "temperature": temperature, "top_p": 1.0}
    settings: dict[str, Any] | None = None

    def ask(numbered: tuple[int, list[int]]) -> list[int]:
        number, prompt = numbered
        reply = client.completions.create(prompt=prompt, seed=seed + number, extra_body=settings, **manner)
        if not reply.choices or not isinstance(reply.choices[0].text, str):
            raise MachineError(
                f"the server at {url} gave no answer", f"its reply was {reply.to_json()[:200]}", SEE_TO_IT
            )
        (answer, *_) = reply.choices
        said = (answer.model_extra or {}).get("token_ids")
        ids = text_ids(tokenizer, answer.text, special=False) if said is None else list(said)
        ended = said is not None and ids[-1:] and ids[-1] in tokenizer.all_special_ids
        if answer.finish_reason == "stop" and tokenizer.eos_token_id is not None and not ended:
            ids.append(tokenizer.eos_token_id)
        return ids

    def ask_all(part: list[tuple[int, list[int]]]) -> list[list[int]]:
        nonlocal settings
        first: list[list[int]] = []
        if settings is None:  # what the server takes shows with the first prompt
            for settings in SETTINGS:
                try:
                    first = [ask(part[0])]
                    break
                except APIStatusError:
                    if settings is SETTINGS[-1]:
                        raise
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return first + list(pool.map(ask, part[len(first) :]))

    documents: list[Document] = []
    written = 0
    waiting = enumerate(prompt_ids(tokenizer, prompt) for prompt in prompts)
    try:
        for part in _parts(waiting):
            for (_, prompt), ids in zip(part, answers_of(part, partial(ask_all, part), keep), strict=True):
                documents.append(Document(prompt + ids, [False] * len(prompt) + [True] * len(ids)))
                written += len(documents[-1].ids)
            if progress is not None:
                progress(min(written, tokens), tokens)
            if written >= tokens:
                break
    except OpenAIError as error:
        raise MachineError(
            f"the server at {url} stopped answering after {len(documents)} answers",
            str(error),
            SEE_TO_IT,
        ) from error
    return documents


def _parts(waiting: Iterator[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Prompts, as many at a time as are asked at once."""
    while part := list(islice(waiting, AT_ONCE)):
        yield part


def client_of(url: str) -> "OpenAI":
    """What asks a server; a key is read from OPENAI_API_KEY, where the server wants one.

    Errors: CalibrationError where the client is not installed, or the address is none.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        remedy = "give the address that ends in /v1, such as http://localhost:8000/v1"
        raise CalibrationError(f"{url!r} is no address of a server", "it is not read as http://HOST:PORT/v1", remedy)
    if find_spec("openai") is None:
        raise CalibrationError(
            "the package openai is not installed", "it asks the server", "pip install logitwise[server]"
        )
    from openai import OpenAI

    return OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
