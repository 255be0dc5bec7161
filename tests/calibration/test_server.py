"""Answers from a server, against a stand-in of one on this machine, asked by the real client."""

import json
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest
from fake_server import SpeaksJson
from source_files import tokenizer
from torch import Tensor

from logitwise.calibration import check_spec, prepare
from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.prompts import shipped_prompts
from logitwise.calibration.server import SETTINGS, ask_answers
from logitwise.errors import CalibrationError, MachineError


class Server(SpeaksJson, BaseHTTPRequestHandler):
    """Answers every prompt with how many tokens it has; from `fails_after` requests on it fails.

    A request with the setting `refuses` is refused, and not counted.
    """

    asked: list[dict[str, Any]]
    refuses: str
    refused: int
    says_ids: list[int] | None
    fails_after: int
    lock = Lock()

    def do_GET(self) -> None:
        self.send({"object": "list", "data": [{"id": "the model", "object": "model", "created": 0, "owned_by": "me"}]})

    def do_POST(self) -> None:
        body = self.body()
        if self.refuses in body:
            type(self).refused += 1
            self.send({"error": {"message": f"{self.refuses} is unknown"}}, 400)
            return
        with self.lock:
            self.asked.append(body)
            count = len(self.asked)
        if count > self.fails_after:
            self.send({"error": {"message": "out of memory"}}, 400)
            return
        length = len(body["prompt"])
        choice = {"index": 0, "text": f"the prompt has {length} tokens", "logprobs": None}
        choice |= {} if self.says_ids is None else {"token_ids": self.says_ids}
        choice["finish_reason"] = "length" if length % 2 else "stop"
        self.send({"id": "1", "object": "text_completion", "created": 0, "model": "the model", "choices": [choice]})


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked, Server.fails_after, Server.refuses, Server.refused, Server.says_ids = [], 10**9, "", 0, None
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_documents_are_prompts_and_answers_in_the_prompts_order(url: str) -> None:
    words, heard = tokenizer(), []
    prompts = [f"what is {'a' * n}" for n in range(1, 41)]
    found = ask_answers(
        url,
        words,
        prompts,
        tokens=10**6,
        answer_tokens=9,
        temperature=0.5,
        seed=7,
        progress=lambda done, total: heard.append(done),
    )
    assert len(found) == 40
    for prompt, document in zip(prompts, found, strict=True):
        before = prompt_ids(words, prompt)
        after = words(f"the prompt has {len(before)} tokens")["input_ids"]
        after += [] if len(before) % 2 else [words.eos_token_id]
        assert document.ids == before + after
        assert document.counts == [False] * len(before) + [True] * len(after)
    assert heard == sorted(heard)
    assert heard[-1] == sum(len(document.ids) for document in found)
    asked = {tuple(body["prompt"]): body for body in Server.asked}
    for number, prompt in enumerate(prompts):
        body = asked[tuple(prompt_ids(words, prompt))]
        expected = {"model": "the model", "max_tokens": 9, "temperature": 0.5, "seed": 7 + number, "top_p": 1.0}
        assert {name: body[name] for name in expected} == expected
        assert {name: body[name] for name in SETTINGS[0]} == SETTINGS[0]  # nothing of the server's own defaults


@pytest.mark.parametrize("refused", ["top_k", "repeat_penalty"])
def test_a_server_gets_no_settings_that_it_refuses(refused: str, url: str) -> None:
    Server.refuses = refused
    prompts = [f"prompt {n}" for n in range(70)]
    found = ask_answers(url, tokenizer(), prompts, tokens=10**6, answer_tokens=9, temperature=1.0, seed=0)
    assert len(found) == len(Server.asked) == 70
    assert Server.refused == next(n for n, settings in enumerate(SETTINGS) if refused not in settings)
    given = next(settings for settings in SETTINGS if refused not in settings)
    unknown = {key for settings in SETTINGS for key in settings} - set(given)
    assert all(body["top_p"] == 1.0 and given.items() <= body.items() for body in Server.asked)
    assert not any(unknown & set(body) for body in Server.asked)


@pytest.mark.parametrize("ended", [True, False])
def test_answers_that_come_as_tokens_are_not_tokenized_again(ended: bool, url: str) -> None:
    words = tokenizer()
    Server.says_ids = [5, 6, words.eos_token_id] if ended else [5, 6]
    prompts = ["a", "ab", "abc"]
    found = ask_answers(url, words, prompts, tokens=10**6, answer_tokens=9, temperature=1.0, seed=0)
    for prompt, document in zip(prompts, found, strict=True):
        before = prompt_ids(words, prompt)
        own_end = [] if len(before) % 2 else [words.eos_token_id]
        assert document.ids == [*before, 5, 6, *([words.eos_token_id] if ended else own_end)]


def test_it_asks_no_more_than_is_wanted(url: str) -> None:
    prompts = [f"prompt {n}" for n in range(500)]
    found = ask_answers(url, tokenizer(), prompts, tokens=300, answer_tokens=9, temperature=1.0, seed=0)
    assert sum(len(document.ids) for document in found) >= 300
    assert len(Server.asked) == len(found) < 100


def test_rows_are_made_of_what_it_answers(url: str) -> None:
    check_spec(f"server:{url}")

    def no_model() -> Any:
        raise AssertionError("a server needs no model here")

    made = prepare(f"server:{url}", tokenizer(), no_model, rows=6, held_out=2, row_tokens=64, seed=0)
    assert (len(made.rows), len(made.held_out)) == (6, 2)
    assert made.rows.counted()
    sent = {tuple(body["prompt"]) for body in Server.asked}
    assert sent <= {tuple(prompt_ids(tokenizer(), prompt)) for prompt in shipped_prompts(50, 0)}


def test_no_server_is_refused_before_any_work() -> None:
    with pytest.raises(CalibrationError, match="does not answer") as caught:
        check_spec("server:http://127.0.0.1:9/v1")
    assert "/v1" in caught.value.remedy
    with pytest.raises(CalibrationError, match="lacks an address"):
        check_spec("server:")


def test_a_server_that_fails_in_the_middle_ends_the_run_to_be_resumed(url: str) -> None:
    Server.fails_after = 40
    with pytest.raises(MachineError, match=r"stopped answering after \d+ answers") as caught:
        ask_answers(url, tokenizer(), ["a"] * 200, tokens=10**6, answer_tokens=9, temperature=1.0, seed=0)
    assert "out of memory" in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("reply", [{"error": "overloaded"}, {"choices": []}, {"choices": [{"index": 0, "text": None}]}])
def test_a_reply_without_an_answer_ends_the_run_to_be_resumed(
    url: str, reply: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Server.send
    monkeypatch.setattr(Server, "send", lambda self, body, code=200: send(self, reply if "choices" in body else body))
    with pytest.raises(MachineError, match=r"gave no answer\n(?s:.*)run the same command again"):
        ask_answers(url, tokenizer(), ["a"] * 3, tokens=10**6, answer_tokens=9, temperature=1.0, seed=0)


def test_answers_that_were_kept_are_not_asked_for_again(url: str) -> None:
    kept: dict[str, dict[str, Tensor]] = {}

    def keep(asked: Sequence[Any], write: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if (key := json.dumps(asked)) not in kept:
            kept[key] = write()
        return kept[key]

    prompts, settings = [f"prompt {n}" for n in range(40)], dict(tokens=10**6, answer_tokens=9, temperature=1.0, seed=0)
    whole = ask_answers(url, tokenizer(), prompts, **settings)
    Server.asked, Server.fails_after = [], 36
    with pytest.raises(MachineError, match="stopped answering after 32 answers"):
        ask_answers(url, tokenizer(), prompts, keep=keep, **settings)
    Server.asked, Server.fails_after = [], 10**9
    assert ask_answers(url, tokenizer(), prompts, keep=keep, **settings) == whole
    assert len(Server.asked) == 40 - 32
