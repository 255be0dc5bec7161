"""Runs that are killed and started again: the same bytes, nothing half written, nothing left behind."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from killable import AT_REST, HEARD, QUANTIZE, Undisturbed, contents, finish, make_model, run_undisturbed, start


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
        last_change = moments.randint(1, undisturbed.changes // 2) if kind == "change" else None
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
