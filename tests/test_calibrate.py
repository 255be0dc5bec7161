"""The rows of a run are made once; where writing them was stopped, it goes on."""

from pathlib import Path

import pytest
import torch
from source_files import llama_config, random_model, save

from logitwise import calibration
from logitwise.calibrate import RunRows, rows_of_run
from logitwise.calibration import generate
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton
from logitwise.source import open_source
from logitwise.watch import SILENT

ASKED = Recipe.load(None, rows=8, held_out=4, row_tokens=32)


def test_text_that_was_stopped_goes_on_but_not_with_another_seed_or_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third batch is not written; the two before it are kept for the same recipe, and for no other."""
    config = llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128)
    source = open_source(save(random_model(config), tmp_path / "model"))
    skeleton = Skeleton(source, torch.device("cpu"), torch.float32)
    true_answer, calls, last = generate.answer, [], 0

    def stopping(*given):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return true_answer(*given)

    def run(name: str, recipe: Recipe = ASKED) -> tuple[RunRows, int]:
        """The rows, and how many batches were written for them."""
        calls.clear()
        return rows_of_run(skeleton, recipe, None, RunFolder(tmp_path / name), "root", SILENT), len(calls)

    monkeypatch.setattr(generate, "answer", stopping)
    monkeypatch.setattr(calibration, "ANSWER_BATCH", 1)
    whole, in_one_go = run("whole")
    last = 3
    with pytest.raises(KeyboardInterrupt):
        run("run")
    last = 0
    for other in (ASKED.but(seed=1), ASKED.but(temperature=0.5)):
        alone, batches = run(f"{other.seed} {other.temperature}", other)
        beside, again = run("run", other)
        assert again == batches
        assert beside.train.digest() == alone.train.digest() != whole.train.digest()
    assert len(list((tmp_path / "run").glob("*-batch-*.json"))) == 2
    resumed, rest = run("run")
    assert rest == in_one_go - 2 > 0
    for one, other in ((resumed.train, whole.train), (resumed.held_out, whole.held_out)):
        assert one.digest() == other.digest()
    assert not list((tmp_path / "run").glob("*-batch-*"))
    assert run("run")[1] == 0


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    config = llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128)
    source = open_source(save(random_model(config), tmp_path / "model"))
    skeleton, file = Skeleton(source, torch.device("cpu"), torch.float32), tmp_path / "text.txt"

    def run() -> str:
        recipe = ASKED.but(calibration=f"text:{file}")
        return rows_of_run(skeleton, recipe, None, RunFolder(tmp_path / "run"), "root", SILENT).train.digest()

    file.write_text("one two three four five six seven\n\n" * 200)
    first = run()
    assert run() == first
    file.write_text("seven six five four three two one\n\n" * 200)
    assert run() != first
