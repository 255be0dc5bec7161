"""Same seed, same machine, same bytes; and what the user has set in Python, NumPy and torch stays as it was."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from killable import make_model

import logitwise
from logitwise import evaluation
from logitwise.recipe import REFIT

SMALL = {"rows": 6, "held_out": 4, "row_tokens": 32, "steps": 4, "batch": 2, "checks": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("same")
    make_model(place)
    (place / "text.txt").write_text("the hen met the man and the ant ate a net.\n\n" * 60, encoding="utf-8")
    made = logitwise.Recipe.load(None, bits=2, group_size=16, **SMALL)
    logitwise.quantize(place / "model", place / "quantized", made.but(method="rtn"))
    return place


def quantize(place: Path, out: Path) -> None:
    polish = {"polish": True, "polish_steps": 4}
    logitwise.quantize(place / "model", out, logitwise.Recipe.load(None, bits=3, group_size=16, **SMALL, **polish))


def refit(place: Path, out: Path) -> None:
    recipe = logitwise.Recipe.load(REFIT, **{**SMALL, "steps": 8})
    logitwise.refit(place / "quantized", out, original=place / "model", recipe=recipe)


def export(place: Path, out: Path) -> None:
    logitwise.export(place / "quantized", out, "gptq")


def evaluate(place: Path, out: Path) -> None:
    text = f"text:{place / 'text.txt'}"
    found = evaluation.evaluate(place / "quantized", reference=place / "model", text=text, rows=6, row_tokens=24)
    out.mkdir()
    (out / "figures").write_text(repr(found.as_json()), encoding="utf-8")


COMMANDS: list[Callable[[Path, Path], None]] = [quantize, refit, export, evaluate]


def state() -> dict[str, object]:
    """What is the user's: generators, and what torch computes by."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "Python's generator": random.getstate(),
        "NumPy's generator": (name, keys.tolist(), *rest),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "precision": torch.get_float32_matmul_precision(),
        "cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


@pytest.fixture
def unusual() -> Iterator[None]:
    """Settings that a user may have and that are nobody's default."""
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    torch.set_float32_matmul_precision(before[2])
    torch.use_deterministic_algorithms(False)


def contents(out: Path) -> dict[str, bytes]:
    reports = ("logitwise.json", "refit.json", "README.md", "report.html")  # they tell how long it took
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in reports}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_the_same_bytes_whatever_was_drawn_before_and_nothing_of_the_users_is_changed(
    command: Callable[[Path, Path], None], place: Path, tmp_path: Path
) -> None:
    made = []
    for seed, name in enumerate(("one", "two")):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = state()
        command(place, tmp_path / name)
        assert state() == before
        made.append(contents(tmp_path / name))
    assert made[0] == made[1]
    assert made[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_the_same_bytes_under_settings_of_the_users(
    command: Callable[[Path, Path], None], place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    command(place, tmp_path / "plain")
    request.getfixturevalue("unusual")
    before = state()
    command(place, tmp_path / "unusual")
    assert state() == before
    assert contents(tmp_path / "unusual") == contents(tmp_path / "plain")
