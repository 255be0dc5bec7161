"""A disk that is full, a folder that cannot be written, state that is damaged: one message, and the command goes on."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killable import AT_REST, HEARD, QUANTIZE, Undisturbed, contents, finish, make_model, run_undisturbed, start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    make_model(place)
    return place


@pytest.fixture(autouse=True)
def only_the_model_is_left(place: Path) -> Iterator[None]:
    yield
    for name in ("out", "out.run"):
        shutil.rmtree(place / name, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Undisturbed:
    return run_undisturbed(place)


def fails(place: Path, code: int = 1, **fault: int) -> str:
    """What a command says that cannot do its work; OUT does not appear."""
    process = start(place, QUANTIZE, **fault)
    process.join(120)
    said = (place / HEARD).read_text()
    assert process.exitcode == code, said
    assert said.count("logitwise:") == said.count("why:") == said.count("do:") == 1, said
    assert "Traceback" not in said
    assert {file.name for file in place.iterdir()} - AT_REST <= {"out.run"}
    return said


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_a_full_disk(share: float, place: Path, undisturbed: Undisturbed) -> None:
    said = fails(place, last_change=round(share * len(undisturbed.changes)), fault=errno.ENOSPC)
    assert "No space left on device" in said
    assert "run the same command again" in said
    finish(place, undisturbed.files)


@pytest.mark.parametrize("bytes_a_file", [3_000, 12_000, 60_000])
def test_a_disk_that_is_full_below_python(bytes_a_file: int, place: Path, undisturbed: Undisturbed) -> None:
    """safetensors writes by itself, and has an error of its own: of the rows, of a window, of the checkpoint."""
    assert "File too large" in fails(place, largest_file=bytes_a_file)
    finish(place, undisturbed.files)


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_a_folder_that_cannot_be_written(share: float, place: Path, undisturbed: Undisturbed) -> None:
    said = fails(place, last_change=round(share * len(undisturbed.changes)), fault=errno.EACCES)
    assert "Permission denied" in said
    assert "out" in said
    finish(place, undisturbed.files)


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of a megabyte with the model beside it."""
    disk = place.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    (disk / "model").symlink_to(place / "model")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_small_disk(small_disk: Path, undisturbed: Undisturbed) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(850_000))
    process = start(small_disk, QUANTIZE)
    process.join(120)
    said = (small_disk / HEARD).read_text()
    assert process.exitcode == 1, said
    assert "No space left on device" in said and "Traceback" not in said
    assert not (small_disk / "out").exists()
    filler.unlink()
    finish(small_disk, undisturbed.files)


@pytest.fixture(scope="module")
def finished_parts(place: Path, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that was killed before it wrote its checkpoint."""
    process = start(place, (*QUANTIZE, "--keep-run"))
    process.join(120)
    kept = tmp_path_factory.mktemp("parts") / "out.run"
    (place / "out.run").rename(kept)
    shutil.rmtree(place / "out")
    return kept


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    file.write_bytes(content)


def remove(file: Path, chance: random.Random) -> None:
    file.unlink()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damaged_state_is_said_and_made_again(
    damage, seed: int, place: Path, undisturbed: Undisturbed, finished_parts: Path
) -> None:
    chance = random.Random(seed)
    shutil.copytree(finished_parts, place / "out.run")
    suffix = "safetensors" if damage is remove else chance.choice(["safetensors", "json"])
    file = chance.choice(sorted((place / "out.run").glob(f"*.{suffix}")))
    damage(file, chance)
    finish(place, undisturbed.files)
    said = "".join((place / HEARD).read_text().split())  # the terminal breaks lines anywhere
    assert f"{file.stem}.*isdamagedorincomplete:thatpartismadeagain" in said


def test_state_of_another_model_is_not_used(place: Path, undisturbed: Undisturbed, finished_parts: Path) -> None:
    """What is whole but was made of something else has another key: it is passed over without a word."""
    shutil.copytree(finished_parts, place / "out.run")
    process = start(place, (*QUANTIZE, "--seed", "1"))
    process.join(120)
    assert process.exitcode == 0
    assert "damaged" not in (place / HEARD).read_text()
    assert contents(place / "out") != undisturbed.files
    shutil.rmtree(place / "out")
