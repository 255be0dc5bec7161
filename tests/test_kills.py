"""Runs that are killed and started again: the same bytes, nothing half written, nothing left behind."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from killable import COUNTED, HEARD, start
from source_files import llama_config, random_model, save

KILLS = 12  # of each kind; tests/kills.py has more
SETTINGS = (
    *("bits=3", "group_size=16", "rows=6", "held_out=4", "row_tokens=48", "steps=6", "batch=2", "checks=2"),
    *("polish=true", "polish_steps=6"),
)
QUANTIZE = ("quantize", "model", "out", *(word for setting in SETTINGS for word in ("--set", setting)))
"""Own text, an MSE fit of each block, the LFQ of the last and the polish."""
AT_REST = {"model", HEARD, COUNTED}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama whose weights are large enough to make its answers sure."""
    place = tmp_path_factory.mktemp("kills")
    model = random_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    save(model, place / "model")
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> tuple[dict[str, bytes], int, float]:
    """The checkpoint of a run that nothing disturbs, how often it changes the disk, and how long it takes."""
    began = time.monotonic()
    process = start(place, QUANTIZE)
    process.join(120)
    seconds = time.monotonic() - began
    assert process.exitcode == 0, (place / HEARD).read_text()
    files = contents(place / "out")
    shutil.rmtree(place / "out")
    return files, int((place / COUNTED).read_text()), seconds


def contents(out: Path) -> dict[str, bytes]:
    """The files of a checkpoint, but for the report, which tells how long it took."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in ("logitwise.json", "README.md")}


def finish(place: Path, expected: dict[str, bytes]) -> None:
    """The same command, undisturbed, gives the same checkpoint and leaves nothing else."""
    process = start(place, QUANTIZE)
    process.join(120)
    assert process.exitcode == 0, (place / HEARD).read_text()
    assert contents(place / "out") == expected
    assert {file.name for file in place.iterdir()} == AT_REST | {"out"}
    shutil.rmtree(place / "out")


def check_killed(place: Path, expected: dict[str, bytes]) -> bool:
    """Whether OUT is there, whole; what else there is may only be what the next run uses or removes."""
    left = {file.name for file in place.iterdir()} - AT_REST - {"out.run"}
    if "out" in left:
        assert contents(place / "out") == expected
        assert left == {"out"}
        return True
    assert all(name.startswith("out.tmp-") for name in left)
    return False


@pytest.mark.parametrize("kind", ["time", "change"])
def test_killed_at_random_moments_again_and_again(
    kind: str, place: Path, undisturbed: tuple[dict[str, bytes], int, float]
) -> None:
    """By the clock most kills hit computation; before a change of the disk they hit what could be left half done."""
    expected, changes, seconds = undisturbed
    moments, kills = random.Random(7), 0
    while kills < KILLS:
        last_change = moments.randint(1, changes) if kind == "change" else None
        process = start(place, QUANTIZE, last_change)
        if kind == "time":
            process.join(moments.uniform(0, seconds))
            process.kill()
        process.join(120)
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), (place / HEARD).read_text()
        if check_killed(place, expected):
            shutil.rmtree(place / "out")
            shutil.rmtree(place / "out.run", ignore_errors=True)
    finish(place, expected)
