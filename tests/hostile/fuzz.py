"""Coverage-guided fuzzing of a reader, by atheris: `python tests/hostile/fuzz.py KIND SECONDS`.

KIND is folder, gguf, gptq, awq, compressed-tensors, mlx or text. An input is one file of a valid model, or of text,
changed; it must be refused by one of our errors or read whole. An input that ends otherwise is written beside the
working directory's other files as crash-*, with its traceback. atheris is not among the packages of `make test`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["logitwise", "gguf"]):
    from hostile_readers import Victim, read_texts

TEXTS = (
    b'{"text": "the man"}\n{"prompt": "a", "completion": "b"}\n',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud83d\\ude00"}]}\n',
    "a passage\n\nanother, \u00e9\n".encode(),
)


def main(kind: str, seconds: str) -> None:
    """Fuzzes one kind of input."""
    place = Path(tempfile.mkdtemp())
    corpus = place / "corpus"
    corpus.mkdir()
    if kind == "text":
        file = place / "text"

        def one(data: bytes) -> None:
            file.write_bytes(data)
            read_texts(file)

        seeds = list(TEXTS)
    else:
        victim = Victim(kind, place)

        def one(data: bytes) -> None:
            if data:  # the first byte says which part is replaced
                victim.read_with(victim.parts[data[0] % len(victim.parts)], data[1:])

        seeds = [bytes([i]) + victim.content(part) for i, part in enumerate(victim.parts)]
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    longest = max(map(len, seeds)) + 1024
    options = [f"-max_total_time={seconds}", f"-max_len={longest}", "-len_control=0", "-seed=1"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
