"""What is kept of an unfinished part: it goes on from there, bit for bit; what is damaged is named and made again."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MemorySource, last_block, tiny_model
from source_files import tokenizer

from logitwise import unfinished
from logitwise.calibration import generate
from logitwise.calibration.generate import write_answers
from logitwise.calibration.rows import Document
from logitwise.descent import Schedule
from logitwise.errors import MachineError
from logitwise.fit import Data, Fitted, Window, fit
from logitwise.grid import Grid
from logitwise.objectives import OBJECTIVES
from logitwise.objectives.lfq import LogitAware
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton
from logitwise.unfinished import batches, halfway
from logitwise.watch import Stage, Watcher

PROMPTS = [f"prompt {'a' * n}" for n in range(20)]
STEPS, TOKENS, TRAIN, HELD_OUT = 12, 9, 8, 4


class Listener(Watcher):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


class Stopping:
    """Calls a function, and stops before the so manyth call."""

    def __init__(self, function: Any, last: int = 0) -> None:
        self.function, self.last, self.calls = function, last, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return self.function(*given)


# ---- text


def written(folder: RunFolder | None, prompts: list[str] = PROMPTS) -> list[Document]:
    """The answers in batches of four, with everything that is to be kept in a folder."""
    keep = {} if folder is None else {"keep": batches(folder, "text")}
    return write_answers(
        tiny_model("llama"), tokenizer(), prompts, tokens=10**6, answer_tokens=6, batch=4, seed=0, **keep
    )


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopping:
    """A run folder in which writing was stopped after three batches; counts those that are written from then on."""
    answer = Stopping(generate.answer, 4)
    monkeypatch.setattr(generate, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        written(RunFolder(tmp_path))
    answer.last = answer.calls = 0
    return answer


def test_text_goes_on_where_it_was_stopped(tmp_path: Path, stopped: Stopping) -> None:
    whole = written(None)
    in_one_go, stopped.calls = stopped.calls, 0
    assert written(RunFolder(tmp_path)) == whole
    assert stopped.calls == in_one_go - 3 > 0


def test_a_damaged_batch_is_named_and_that_one_is_written_again(tmp_path: Path, stopped: Stopping) -> None:
    written(RunFolder(tmp_path))  # all are there
    files = sorted(tmp_path.glob("*.safetensors"))
    damaged = random.Random(0).choice(files)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    whole, listener = written(None), Listener()
    stopped.calls = 0
    assert written(RunFolder(tmp_path, listener)) == whole
    assert stopped.calls == 1
    assert listener.said == [f"{damaged.with_suffix('.*')} is damaged or incomplete: that part is made again"]


def test_answers_to_other_prompts_are_not_taken(tmp_path: Path, stopped: Stopping) -> None:
    """As where a file of prompts was changed meanwhile."""
    others = [*PROMPTS[:-1], "another"]
    whole = written(None, others)
    in_one_go, stopped.calls = stopped.calls, 0
    assert written(RunFolder(tmp_path), others) == whole
    # What the two have in common is the first batch, which shows how long answers are.
    assert stopped.calls >= in_one_go - 1


def test_the_batches_go_when_the_part_is_finished(tmp_path: Path, stopped: Stopping) -> None:
    folder = RunFolder(tmp_path)
    folder.save_tensors("text of another", {"x": torch.zeros(1)}, {})
    folder.save_tensors("text", {"x": torch.zeros(1)}, {})
    assert {file.stem for file in tmp_path.iterdir()} == {"text", "text of another"}
    assert folder.has("text")


# ---- fits


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def data(skeleton: Skeleton) -> Data:
    """The last block: its inputs, its outputs."""
    ids, inputs, targets = last_block(skeleton, TRAIN + HELD_OUT, TOKENS)
    return Data(inputs, targets, torch.ones(ids.shape), ids.roll(-1, 1), TRAIN, HELD_OUT)


def fitted(
    skeleton: Skeleton, data: Data, folder: RunFolder | None, method: str = "flexround", choose: Any = "held_out"
) -> Fitted:
    """The last block by LFQ in 12 steps, asked after 0, 3, 6, 9 and 12."""
    window = Window(skeleton, range(2, 3), skeleton.calls(TOKENS), lambda slot: False)
    quantizers = window.quantizers(QUANTIZERS[method], lambda _: Grid(3, 16, False), STARTS["minmax"])
    schedule = Schedule(STEPS, 3, 4, Recipe(method=method).learning_of, 0, choose)
    kept = None if folder is None else halfway(folder, "fit")
    return fit(window, quantizers, OBJECTIVES["lfq"](), skeleton.head(), data, schedule, Stage(), halfway=kept)


def assert_same(one: Fitted, other: Fitted) -> None:
    assert (one.course, one.tokens) == (other.course, other.tokens)
    for slot, quantized in one.quantized.items():
        assert all(torch.equal(a, b) for a, b in zip(quantized.parts(), other.quantized[slot].parts(), strict=True))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Stops the fit in its so manyth step; the list grows by one a step."""
    steps: list[int] = []
    loss = LogitAware.loss

    def stopping(self: LogitAware, taps: Any) -> Any:
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return loss(self, taps)

    monkeypatch.setattr(LogitAware, "loss", stopping)
    return steps


@pytest.mark.parametrize(
    ("method", "choose"),
    [(name, "held_out") for name, method in QUANTIZERS.items() if method.learns] + [("flexround", "batch")],
)
def test_a_fit_goes_on_from_its_last_check(
    skeleton: Skeleton, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, choose: str
) -> None:
    """Every optimiser, and every method's own state."""
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    whole = fitted(skeleton, data, None, method, choose)
    steps = stop_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        fitted(skeleton, data, RunFolder(tmp_path), method, choose)
    assert {file.stem for file in tmp_path.iterdir()} == {"fit-step-00000009"}  # and no earlier one
    assert_same(fitted(skeleton, data, RunFolder(tmp_path), method, choose), whole)
    assert len(steps) == 11 + 3


def test_a_fit_whose_state_is_damaged_begins_anew(
    skeleton: Skeleton, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    whole = fitted(skeleton, data, RunFolder(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    listener = Listener()
    assert_same(fitted(skeleton, data, RunFolder(tmp_path, listener)), whole)
    assert listener.said == [f"{file.with_suffix('.*')} is damaged or incomplete: that part is made again"]
    assert {file.stem for file in tmp_path.iterdir()} == {"fit-step-00000009"}


def test_a_short_fit_keeps_nothing(skeleton: Skeleton, data: Data, tmp_path: Path) -> None:
    fitted(skeleton, data, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_it_does_not_end_a_fit(
    skeleton: Skeleton, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    whole, listener = fitted(skeleton, data, None), Listener()

    def full(*given: object) -> None:
        raise MachineError("it cannot be written", "No space left on device", "free some disk")

    monkeypatch.setattr(RunFolder, "write", full)
    assert_same(fitted(skeleton, data, RunFolder(tmp_path, listener)), whole)
    said = "how far it is at step {} could not be kept: No space left on device"
    assert listener.said == [said.format(step) for step in (3, 6, 9)]
