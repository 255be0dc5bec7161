"""A model that a server serves, as one more candidate: what the server can be asked is found out before any work.

Servers that speak OpenAI's protocol differ. A prompt goes out as token ids where they are taken, so that the tokens are
the very same; else as text, where the server counts as many tokens; else as a message to its own chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.server import SETTINGS, client_of, served_models
from logitwise.comparison.replies import Named, Pieces, by_ids, by_texts
from logitwise.errors import LogitwiseError, MachineError, SourceError
from logitwise.runfolder import chain
from logitwise.watch import Watcher

if TYPE_CHECKING:
    from openai import OpenAI

IDS, TEXT, TEXT_AFTER_BOS, CHAT = "token ids", "text", "text without its BOS", "chat"
"""How a prompt is sent."""

PROMPT_LOGPROBS, ECHO = "prompt_logprobs", "echo"
"""How the log-probabilities of a prompt are asked for: vLLM's way, and that of the older protocol."""

LIKELIEST = (100, 20, 5, 1)
"""Tokens to be named at each position, the most that a server allows: vLLM allows 20 unless told otherwise."""

PROBE = "What is the capital of France?"
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt as a person wrote it, and as the tokens that the model reads."""

    words: str
    ids: list[int]


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Args:
        text: of the answer.
        ids: its tokens, where the server says them.
        ended: whether it came to its end by itself.
        read: how many tokens the server counted in the prompt.
    """

    text: str
    ids: list[int] | None
    ended: bool
    read: int | None


@dataclass(frozen=True)
class Served:
    """A model behind a server, with how it is asked.

    Args:
        name: in the report.
        url: of the server, up to /v1.
        model: its id there.
        pieces: the texts of full precision's tokens.
        prompts: how a prompt is sent: IDS, TEXT, TEXT_AFTER_BOS or CHAT.
        log_probabilities: how those of a prompt are asked for, PROMPT_LOGPROBS or ECHO; None: the server gives none.
        likeliest: how many tokens it names at each position.
        settings: those of SETTINGS that it takes.
        says_ids: whether it says the tokens of its answers.
        room: how many tokens it reads and writes at most; None where it does not say.
        digest: of what it says to one prompt: another model behind the same address is not taken for this one.
    """

    name: str
    url: str
    model: str
    pieces: Pieces
    prompts: str = IDS
    log_probabilities: str | None = None
    likeliest: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    says_ids: bool = False
    room: int | None = None
    digest: str = ""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Full precision's."""
        return self.pieces.tokenizer

    @property
    def address(self) -> str:
        """The server's, without what a password may stand in."""
        parts = urlsplit(self.url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"

    def answer(self, prompt: Prompt, tokens: int, temperature: float, seed: int) -> Reply:
        """An answer of at most `tokens` tokens.

        Errors: MachineError.
        """
        manner: dict[str, Any] = {"max_tokens": tokens, "temperature": temperature, "seed": seed, "top_p": 1.0}
        manner["extra_body"] = self.settings
        with _Asking(self):
            if self.prompts == CHAT:
                message: Any = [{"role": "user", "content": prompt.words}]
                made: Any = self._client.chat.completions.create(model=self.model, messages=message, **manner)
                text, ids = made.choices[0].message.content, None
            else:
                made = self._client.completions.create(model=self.model, prompt=self._sent(prompt.ids), **manner)
                text, ids = made.choices[0].text, (made.choices[0].model_extra or {}).get("token_ids")
            read = made.usage.prompt_tokens if made.usage else None
            return Reply(text or "", ids, made.choices[0].finish_reason == "stop", read)

    def named(self, ids: Sequence[int]) -> list[Named | None] | None:
        """What the server says of each token but the first; None where it reads other tokens in the same text.

        Errors: MachineError.
        """
        with _Asking(self):
            given: Any = {"model": self.model, "prompt": self._sent(ids), "max_tokens": 1, "temperature": 0.0}
            if self.log_probabilities == PROMPT_LOGPROBS:
                more = {"prompt_logprobs": self.likeliest}
                return by_ids(self._client.completions.create(**given, extra_body=more), ids)
            reply = self._client.completions.create(**given, echo=True, logprobs=self.likeliest)
            return by_texts(reply, ids, self.pieces, self.tokenizer.bos_token_id)

    def check_room(self, prompts: Sequence[Prompt], answer_tokens: int) -> None:
        """Refuses prompts and answers that are longer than the server reads.

        Errors: SourceError.
        """
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if self.room is not None and (needed := longest + answer_tokens + 1) > self.room:
            raise SourceError(
                f"the server at {self.address} reads at most {self.room} tokens",
                f"prompts of up to {longest} tokens, answers of up to {answer_tokens} and one more need {needed}",
                "start it with a larger length (--max-model-len), or give a smaller --answer-tokens",
            )

    @cached_property
    def _client(self) -> "OpenAI":
        return client_of(self.url)

    def _sent(self, ids: Sequence[int]) -> Any:
        """A prompt as this server takes it."""
        if self.prompts == IDS:
            return list(ids)
        sent = list(ids)[1:] if self.prompts == TEXT_AFTER_BOS else list(ids)
        return self.tokenizer.decode(sent, clean_up_tokenization_spaces=False)


class _Asking:
    """Turns what goes wrong with a server into one error."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from openai import OpenAIError

        # The others are replies that are none: a page, an empty list, a figure that is a word.
        if isinstance(error, OpenAIError | AttributeError | IndexError | KeyError | TypeError | ValueError):
            raise MachineError(
                f"the server at {self.served.address} does not answer as it should",
                str(error),
                "see to the server and run the same command again: finished parts are kept",
            ) from error


def open_served(spec: str, tokenizer: PreTrainedTokenizerBase, watcher: Watcher) -> Served:
    """The model of a server, asked how it can be asked.

    Args:
        spec: the address, up to /v1; after a #, the model's id where there are several.
        tokenizer: full precision's.

    Errors: CalibrationError where the address is none or no server answers; SourceError where it serves several models
    and none is chosen, or nothing that it offers can be asked.
    """
    url, _, chosen = spec.partition("#")
    rooms = {model.id: (model.model_extra or {}).get("max_model_len") for model in served_models(url)}
    offered = list(rooms)
    if chosen not in offered and (chosen or len(offered) > 1):
        raise SourceError(
            f"{url} serves no model {chosen}" if chosen else f"{url} serves several models",
            f"there are {', '.join(offered)}",
            f"name one of them after the address: --server {url}#{offered[0]}",
        )
    model = chosen or offered[0]
    served = _with_prompts(Served(model, url, model, Pieces(tokenizer), room=rooms[model]), watcher)
    served = _with_log_probabilities(served, watcher)
    prompt = _probe(tokenizer)
    reply = served.answer(prompt, PROBE_TOKENS, 0.0, 0)
    said = served.named(prompt.ids) if served.log_probabilities else None
    rounded = [[(token, round(value, 2)) for token, value in named or ()] for named in said or ()]
    digest = chain("served", url=url, model=model, prompts=served.prompts, answer=reply.text, said=rounded)
    _tell(served, watcher)
    return replace(served, says_ids=reply.ids is not None, digest=digest)


def _probe(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    return Prompt(PROBE, prompt_ids(tokenizer, PROBE))


def _with_prompts(served: Served, watcher: Watcher) -> Served:
    """Finds how a prompt is sent, and with which settings.

    Errors: SourceError.
    """
    prompt, why = _probe(served.tokenizer), "it takes no prompt"
    forms = [IDS, TEXT] + ([TEXT_AFTER_BOS] if prompt.ids[0] == served.tokenizer.bos_token_id else [])
    if served.tokenizer.chat_template:
        forms.append(CHAT)
    for form in forms:
        for settings in SETTINGS:
            tried = replace(served, prompts=form, settings=settings)
            try:
                read = tried.answer(prompt, 1, 0.0, 0).read
            except LogitwiseError as error:
                why = error.why
                continue
            break
        else:
            continue
        same = read == len(prompt.ids)
        if same or form == CHAT or (form == IDS and read is None):
            if form == CHAT and not same:
                watcher.say(
                    f"{served.name}: the server's chat template makes {read or 'an unknown number of'} tokens of a "
                    f"prompt that is {len(prompt.ids)} here: differences may be the template's"
                )
            return tried
        why = f"it reads {read} tokens in a prompt of {len(prompt.ids)}"
    raise SourceError(
        f"the server at {served.address} cannot be given the model's own tokens",
        why,
        "serve the model with the tokenizer of the full-precision one, through an engine that takes token ids",
    )


def _with_log_probabilities(served: Served, watcher: Watcher) -> Served:
    """Finds how the log-probabilities of a prompt are asked for, and of how many tokens; as it was where it is not."""
    if served.prompts == CHAT:
        return served
    for way in (PROMPT_LOGPROBS, ECHO):
        for likeliest in LIKELIEST:
            tried = replace(served, log_probabilities=way, likeliest=likeliest)
            try:
                named = tried.named(_probe(served.tokenizer).ids)
            except LogitwiseError as error:  # more than the server allows, or than it can
                watcher.detail(f"{served.name}: no {likeliest} log-probabilities by {way}: {error.why}")
                continue
            if named is None:
                break
            return tried
    return served


def _tell(served: Served, watcher: Watcher) -> None:
    way = f"{served.name}: prompts go to {served.address} as {served.prompts}"
    if served.log_probabilities:
        watcher.say(f"{way}; it names the {served.likeliest} likeliest tokens of each position")
    else:
        watcher.say(f"{way}; it gives no log-probabilities of a prompt, so only its answers are compared")
