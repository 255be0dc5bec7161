"""Hub ids, against a stand-in of the hub on this machine."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from source_files import llama_config, random_model, save

from logitwise.errors import SourceError
from logitwise.source import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One model, `org/tiny`, with the branches `main` and `dev`; `org/gated` may not be read."""

    folder: Path
    fetched: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "org/gated" in path:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif "org/tiny" not in path:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            self.send_json([self.entry(file) for file in sorted(self.folder.iterdir())])
        elif path in (
            "/api/models/org/tiny",
            "/api/models/org/tiny/revision/main",
            "/api/models/org/tiny/revision/dev",
        ):
            self.send_json({"id": "org/tiny", "sha": COMMIT, "siblings": []})
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            content = (self.folder / name).read_bytes()
            self.send(200, content, {"ETag": f'"{self.blob(content)}"', "X-Repo-Commit": COMMIT}, body)
            if body:
                self.fetched.append(name)
        else:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)

    @staticmethod
    def blob(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def entry(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        return {"type": "file", "path": file.name, "size": len(content), "oid": self.blob(content)}

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, True)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)

    class Served(Hub):
        folder = save(random_model(llama_config()), tmp_path / "served")
        fetched: list[str] = []  # noqa: RUF012
        endpoint = ""

    (Served.folder / "LICENSE").write_text("licence")
    (Served.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Served.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield Served
    server.shutdown()
    server.server_close()


def test_model_is_fetched_without_pickles(hub: Any):
    source = open_source("org/tiny", endpoint=hub.endpoint)
    assert source.name == "org/tiny"
    expected = random_model(llama_config()).state_dict()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    assert source.tokenizer()("the").input_ids == [source.tokenizer().get_vocab()["the"]]
    assert "LICENSE" in [file.name for file in source.extra_files()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= set(hub.fetched)
    assert "pytorch_model.bin" not in hub.fetched


def test_second_time_comes_from_the_cache_even_without_the_hub(hub: Any):
    open_source("org/tiny", endpoint=hub.endpoint)
    count = len(hub.fetched)
    open_source("org/tiny", endpoint=hub.endpoint)
    assert len(hub.fetched) == count
    open_source("org/tiny", endpoint="http://127.0.0.1:9")


def test_what_is_on_the_disk_has_no_revision(tmp_path: Path):
    with pytest.raises(SourceError, match=r"has no revision dev\n.*only models of the hub"):
        open_source(tmp_path, revision="dev")


def test_revision(hub: Any):
    assert "lm_head.weight" in open_source("org/tiny", revision="dev", endpoint=hub.endpoint).names()
    with pytest.raises(SourceError, match=r"org/tiny has no revision 'old'"):
        open_source("org/tiny", revision="old", endpoint=hub.endpoint)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/other", "org/other is not on the hub"),
        ("org/gated", "org/gated is gated"),
        ("two words", "'two words' is no hub id"),
    ],
)
def test_refusals_say_what_was_looked_for(hub: Any, model: str, expected: str):
    with pytest.raises(SourceError) as refused:
        open_source(model, endpoint=hub.endpoint)
    assert expected in str(refused.value)
    assert "no such folder here, so it was taken as a hub id" in str(refused.value)


def test_hub_that_cannot_be_reached(hub: Any):
    with pytest.raises(SourceError) as refused:
        open_source("org/tiny", endpoint="http://127.0.0.1:9")
    assert "org/tiny cannot be fetched from the hub" in str(refused.value)
    assert "not in the cache" in str(refused.value)
