"""llama.cpp by llama-cpp-python, its cache of keys and values in float32.

Where a question has `texts`, `token_ids` are those that llama.cpp's own tokenizer makes of each.
"""

from typing import Any

from answering import Answer, answer_all, by_logits
from llama_cpp import GGML_TYPE_F32, Llama


class Loaded:
    """A .gguf file."""

    def __init__(self, path: str) -> None:
        self.model = Llama(
            path, n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False,
            type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
        )  # fmt: skip

    def logits(self, ids: list[int]) -> Any:
        self.model.reset()
        self.model.eval(ids)
        return self.model.scores[: len(ids)]


def answer(asked: Answer) -> Answer:
    """Log-probabilities, and token ids of the texts."""
    found = by_logits(Loaded)(asked)
    if "texts" in asked:
        model = Llama(asked["path"], vocab_only=True, verbose=False)
        found["token_ids"] = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    return found


if __name__ == "__main__":
    answer_all(answer, ["llama-cpp-python"])
