"""Runs that are killed and started again: the same bytes, nothing half written, nothing left behind."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from killable import (
    AT_REST,
    HEARD,
    QUANTIZE,
    Undisturbed,
    changes_of,
    contents,
    finish,
    make_model,
    run_undisturbed,
    start,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kills")
    make_model(place)
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Undisturbed:
    return run_undisturbed(place)


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
    kind: str, place: Path, undisturbed: Undisturbed, pytestconfig: pytest.Config
) -> None:
    """By the clock most kills hit computation; before a change of the disk they hit what could be left half done."""
    expected = undisturbed.files
    moments, kills = random.Random(7), 0
    while kills < pytestconfig.getoption("kills"):
        last_change = moments.randint(1, len(undisturbed.changes) // 2) if kind == "change" else None
        process = start(place, QUANTIZE, last_change)
        if kind == "time":
            process.join(moments.uniform(0, undisturbed.seconds))
            process.kill()
        process.join(120)
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), (place / HEARD).read_text()
        if check_killed(place, expected):
            shutil.rmtree(place / "out")
            shutil.rmtree(place / "out.run", ignore_errors=True)
    finish(place, expected)


def writes(changes: list[str], unfinished: str) -> list[int]:
    """Which changes write what is kept of unfinished parts, from 1 on; three each."""
    return [at for at, name in enumerate(changes, start=1) if unfinished in name and name.endswith(".partial")]


@pytest.mark.parametrize("unfinished", ["-batch-", "-step-"])
def test_killed_in_the_midst_of_text_or_of_a_fit_it_goes_on_there(
    unfinished: str, place: Path, undisturbed: Undisturbed
) -> None:
    """It is killed once half of all that is kept was kept; none of that is written again."""
    in_one_go = writes(undisturbed.changes, unfinished)
    half = len(in_one_go) // 6 * 3
    process = start(place, QUANTIZE, in_one_go[half - 1] + 1)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert list((place / "out.run").glob(f"*{unfinished}*.json"))
    finish(place, undisturbed.files)
    assert len(writes(changes_of(place), unfinished)) == len(in_one_go) - half
