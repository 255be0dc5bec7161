"""Engines load checkpoints of logitwise, and their log-probabilities are compared with ours.

    python benchmarks/engines/compare.py ENGINE ...

Each engine runs in its own environment (`make engines` makes them), is given the same tokens as our forward, and must
come as near to it as its gate says. The checkpoints are small random models, rounded to nearest on every grid that a
format holds, and some that are wrong on purpose, which must miss the gate. Our forward is transformers' in float32,
with the weights that logitwise reads from the file.

With --checkpoint, the engines that load it are asked about a checkpoint of yours: the same text, and what they answer
to a question, token by token.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, cases
from engines import ENGINES, Difference, Process, process
from models import TEXT, TEXTS
from table import Row, line, page, table
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitwise.formats import FORMATS
from logitwise.source import QuantizedSource, Source, open_stored

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER_TOKENS = 20


@dataclass(frozen=True)
class Ours:
    """A checkpoint as logitwise reads it, computed in float32."""

    source: Source
    model: PreTrainedModel

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Of every token of the vocabulary after each position, [tokens, vocabulary]; normalised in float64."""
        return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def of_text(self, ids: list[int]) -> torch.Tensor:
        """Of each token after the first, [tokens - 1]."""
        return self.log_probabilities(ids)[:-1].gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


@lru_cache(maxsize=2)
def ours(path: Path) -> Ours:
    """A checkpoint by logitwise's own reading."""
    source = open_stored(path)
    for key in ("quantization", "quantization_config"):
        if hasattr(source.config, key):
            delattr(source.config, key)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    return Ours(source, model)


def main() -> None:
    """Prints a line for each checkpoint and a table of all; exit code 1 where one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", choices=ENGINES, metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--format", choices=FORMATS, action="append", help="of the small checkpoints; may come again")
    parser.add_argument("--checkpoint", type=Path, action="append", help="a folder or .gguf file; may come again")
    parser.add_argument("--page", type=Path, help="put what became of the small ones into a page of Markdown")
    given = parser.parse_args()
    torch.set_num_threads(1)  # small products, beside which the engine's own threads want the cores
    began = time.monotonic()
    rows: list[Row] = []
    for name in given.engines:
        with tempfile.TemporaryFile("w+") as log, process(ENGINES[name], log) as running:
            formats = [form for form in ENGINES[name].formats if form in (given.format or FORMATS)]
            for found in (
                [of_user(running, given.checkpoint)] if given.checkpoint else map(partial(small, running), formats)
            ):
                asked = [told(row) for row in found]
                rows += asked
                if given.page and not given.checkpoint:
                    write_page(given.page, asked, running.versions)
    if given.checkpoint:
        print(table(rows))
    wrong = [row for row in rows if not row.expected]
    for row in wrong:
        print(line(row))
    print(f"{len(rows)} checkpoints in {time.monotonic() - began:.0f} s; {len(wrong)} not as they must be")
    sys.exit(bool(wrong) or not rows)


def told(row: Row) -> Row:
    """The same, once it was told."""
    print(line(row), file=sys.stderr, flush=True)
    return row


def write_page(file: Path, rows: list[Row], versions: dict[str, str]) -> None:
    """Puts the rows of one engine and format into a page."""
    file.write_text(page(rows, versions, file.read_text("utf-8") if file.exists() else ""), encoding="utf-8")


def small(running: Process, name: str) -> Iterator[Row]:
    """The small checkpoints of a format."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(name, Path(folder)):
            if running.engine.asked(case):
                yield compared(running, case, {"texts": TEXTS})


def of_user(running: Process, checkpoints: list[Path]) -> Iterator[Row]:
    """Checkpoints from elsewhere, those that the engine loads."""
    for path in checkpoints:
        source = open_stored(path)
        if not isinstance(source, QuantizedSource):
            raise SystemExit(f"{path} is not quantized")
        if source.format.name not in running.engine.formats:
            continue
        grids = {grid for name in source.names() if (grid := source.grid(name))}
        loaded = next(path.glob("*.gguf")) if source.format.name == "gguf" and path.is_dir() else path
        case = Case(source.format.name, source.name, grids.pop() if len(grids) == 1 else None, loaded.resolve(), path)
        yield compared(running, case, {"texts": TEXTS, "messages": MESSAGES, "count": ANSWER_TOKENS})


def compared(running: Process, case: Case, question: dict[str, Any]) -> Row:
    """An engine's answer beside ours."""
    engine, mine = running.engine, ours(case.right)
    tokenizer = mine.source.tokenizer()
    ids = tokenizer(TEXT).input_ids
    if "messages" in question:
        prompt = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
        question["prompt"] = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = running.ask({"path": str(case.loaded), "ids": ids, **question})
    if "error" in answer:
        return Row(case, engine.name, None, answer["error"], engine.fails(case))
    difference = Difference.of(torch.tensor(answer["log_probabilities"], dtype=torch.float64), mine.of_text(ids))
    misread = engine.misreads(case)
    expected, notes = (
        engine.gate(case).met(difference) is not (case.wrong or bool(misread)),
        [misread] if misread else [],
    )
    if "token_ids" in answer:
        same = answer["token_ids"] == [tokenizer(text).input_ids for text in question["texts"]]
        expected, notes = expected and same, [*notes, *([] if same else ["token ids of texts differ"])]
    if "greedy" in answer:
        explained, said = same_answer(mine, question["prompt"], answer["greedy"], 2 * difference.largest)
        expected, notes = expected and explained, [*notes, said]
    if "chat" in answer:
        notes.append(f"chat: {answer['chat']!r}")
    return Row(case, engine.name, difference, "; ".join(notes), expected)


def same_answer(mine: Ours, prompt: list[int], theirs: list[int], doubt: float) -> tuple[bool, str]:
    """Whether an engine's likeliest tokens are ours, or first differ where ours is likelier by no more than the doubt.

    Args:
        mine: our model.
        prompt: the tokens that are answered.
        theirs: the engine's answer.
        doubt: by how much log-probabilities of two tokens may be nearer in the engine, in nats.
    """
    for place, token in enumerate(theirs):
        found = mine.log_probabilities([*prompt, *theirs[:place]])[-1]
        best = int(found.argmax())
        if best != token:
            margin = float(found[best] - found[token])
            why = f"token {place + 1} of {len(theirs)} differs: ours is likelier by {margin:.2g}"
            return margin <= doubt, why
    return True, f"the same {len(theirs)} tokens: {mine.source.tokenizer().decode(theirs, skip_special_tokens=True)!r}"


if __name__ == "__main__":
    main()
