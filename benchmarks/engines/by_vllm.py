"""vLLM on a CPU in float16, over HTTP: asked by the OpenAI client, one server for each checkpoint.

Where a question has `messages`, `chat` is the server's answer to them, of `count` tokens.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import IO

from answering import Answer, answer_all
from openai import APIConnectionError, APIError, OpenAI

PATIENCE = 600
"""Seconds that a server may take to start."""
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_NO_USAGE_STATS": "1",
}


def answer(asked: Answer) -> Answer:
    """What a server of this checkpoint says."""
    with tempfile.TemporaryFile("w+") as log:
        try:
            with serving(asked["path"], log) as client:
                return answered(client, asked)
        except (APIError, ServerEnded) as error:
            return {"error": cause(log) or f"{type(error).__name__}: {error}"}


def answered(client: OpenAI, asked: Answer) -> Answer:
    """The answers to each part of a question."""
    ids = asked["ids"]
    scored = client.completions.create(model="m", prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 0})
    each = scored.choices[0].model_extra["prompt_logprobs"]
    found: Answer = {"log_probabilities": [each[place][str(ids[place])]["logprob"] for place in range(1, len(ids))]}
    exact = {"temperature": 0, "max_tokens": asked.get("count")}
    if "prompt" in asked:
        body = {"ignore_eos": True, "return_token_ids": True}
        said = client.completions.create(model="m", prompt=asked["prompt"], extra_body=body, **exact)
        found["greedy"] = said.choices[0].model_extra["token_ids"]
    if "messages" in asked:
        said = client.chat.completions.create(model="m", messages=asked["messages"], **exact)
        found["chat"] = said.choices[0].message.content
    return found


class ServerEnded(Exception):
    """The server was gone, or had not begun to answer in time."""


@contextmanager
def serving(path: str, log: IO[str]) -> Iterator[OpenAI]:
    """A client of a new server, which ends with the body."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["--model", path, "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "4", "--dtype", "float16"]
    # Not `vllm serve`, which asks for its own version under a name that vllm-cpu is not installed by.
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
        env={**os.environ, **SETTINGS}, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        wait(client, server)
        yield client
    finally:
        server.terminate()
        server.wait(120)


def wait(client: OpenAI, server: "subprocess.Popen[bytes]") -> None:
    """Returns once the server answers.

    Errors: ServerEnded.
    """
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(1)
    raise ServerEnded(f"exit code {server.poll()}")


def cause(log: IO[str]) -> str | None:
    """The first error that a server's own lines name, and the line after it where that says why."""
    log.seek(0)
    lines = [re.sub(r"^\([^)]*\)\s*(?:ERROR [^\]]*\]\s*)?|^ERROR [^\]]*\]\s*", "", line).strip() for line in log]
    for line, after in pairwise([*lines, ""]):
        if re.match(r"(\w+\.)*\w+Error: .", line):
            goes_on = line.endswith(":") or "validation error" in line
            return f"{line} {after}" if goes_on else line
    return None


if __name__ == "__main__":
    answer_all(answer, ["vllm-cpu", "torch", "transformers", "compressed-tensors", "openai"])
