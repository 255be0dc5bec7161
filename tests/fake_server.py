"""A stand-in of an OpenAI-compatible server, in this process: it answers with a real model, as the engines do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Refused(Exception):
    """What the server will not do: status code 400."""


@dataclass
class Engine:
    """A model and what its server can do.

    Args:
        prompt_logprobs: named by ids, at most `most` of them, as vLLM does.
        echo: the older protocol's.
        takes_ids: prompts may be token ids.
        completions: there are completions, not chat alone.
        says_ids: answers come as token ids too.
        before: tokens put before a prompt that is text.
        strict: settings that are not OpenAI's are refused.
        fails_after: so many requests are answered.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    names: tuple[str, ...] = ("w",)
    prompt_logprobs: bool = False
    echo: bool = False
    most: int = 10**6
    takes_ids: bool = True
    completions: bool = True
    says_ids: bool = False
    before: tuple[int, ...] = ()
    room: int | None = None
    strict: bool = False
    fails_after: int = 10**9
    asked: list[dict[str, Any]] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        with self.lock:
            self.asked.append(body)
            if len(self.asked) > self.fails_after:
                raise Refused("out of memory")
            if self.strict and set(body) & {"repetition_penalty", "prompt_logprobs", "return_token_ids"}:
                raise Refused("there is no such setting")
            if path.endswith("/chat/completions"):
                return self.chat(body)
            if not self.completions:
                raise Refused("there are no completions")
            return self.complete(body)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = [*self.before, *self.tokenizer(ids)["input_ids"]]
        elif not self.takes_ids:
            raise Refused("prompt: a text was expected")
        written, ended = self.write(ids, body)
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None}
        choice["finish_reason"] = "stop" if ended else "length"
        if self.says_ids and body.get("return_token_ids"):
            choice["token_ids"] = written
        if self.prompt_logprobs and "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self.by_ids(ids, body["prompt_logprobs"])
        if body.get("echo") and self.echo:
            choice["logprobs"] = self.by_texts(ids + written, body["logprobs"])
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(written), "total_tokens": 0}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "w", "choices": [choice], "usage": usage}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.tokenizer.chat_template:
            raise Refused("there is no chat template")
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text)["input_ids"]
        written, ended = self.write(ids, body)
        message = {"role": "assistant", "content": self.tokenizer.decode(written, skip_special_tokens=True)}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(written), "total_tokens": 0}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "w", "choices": [choice], "usage": usage}

    def write(self, ids: list[int], body: dict[str, Any]) -> tuple[list[int], bool]:
        """Tokens of an answer, greedy ones at temperature 0, and whether it came to its end."""
        written: list[int] = []
        draws = torch.Generator().manual_seed(body.get("seed", 0))
        while len(written) < body["max_tokens"]:
            logits = self.logits(ids + written)[-1]
            if body["temperature"]:
                drawn = torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=draws)
                written.append(int(drawn))
            else:
                written.append(int(logits.argmax()))
            if written[-1] == self.tokenizer.eos_token_id:
                return written, True
        return written, False

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0]

    def named(self, ids: list[int], count: int) -> list[dict[int, float] | None]:
        """At each position the likeliest tokens and the one that is there."""
        if count > self.most:
            raise Refused(f"at most {self.most} log-probabilities")
        found: list[dict[int, float] | None] = [None]
        for token, row in zip(ids[1:], self.logits(ids).log_softmax(-1), strict=False):
            values, tokens = row.topk(min(count, len(row)))
            found.append({**dict(zip(tokens.tolist(), values.tolist(), strict=True)), token: float(row[token])})
        return found

    def by_ids(self, ids: list[int], count: int) -> list[Any]:
        return [
            named and {str(token): {"logprob": value, "rank": 1, "decoded_token": ""} for token, value in named.items()}
            for named in self.named(ids, count)
        ]

    def by_texts(self, ids: list[int], count: int) -> dict[str, Any]:
        named, texts = self.named(ids, count), [self.tokenizer.decode([token]) for token in ids]
        pairs = list(zip(ids, named, strict=True))
        return {
            "tokens": texts,
            "token_logprobs": [said and said[token] for token, said in pairs],
            "top_logprobs": [
                said and {self.tokenizer.decode([token]): value for token, value in said.items()} for said in named
            ],
            "text_offset": [0] * len(ids),
        }


class SpeaksJson:
    """A request handler that reads and sends JSON, and says nothing of it."""

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return found

    def send(self, body: dict[str, Any], code: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        return


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The address of a server, which ends with the body."""

    class Handler(SpeaksJson, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in engine.names]
            self.send({"object": "list", "data": [{**model, "max_model_len": engine.room} for model in models]})

        def do_POST(self) -> None:
            try:
                self.send(engine.reply(self.path, self.body()))
            except Refused as refused:
                self.send({"error": {"message": str(refused)}}, 400)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
