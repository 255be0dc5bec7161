"""The command line as a user meets it: exit codes, one message, the README's commands at toy size."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_server import Engine, serving
from source_files import decided_model, llama_config, save, tokenizer
from transformers import AutoModelForCausalLM
from typer.main import get_command

from logitwise import cli
from logitwise.recipe import REFIT, Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text."""
    place = tmp_path_factory.mktemp("place")
    model = decided_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=256))
    save(model, place / "model")
    (place / "text.txt").write_text("the hen met the man and the ant ate a net.\n\n" * 80, encoding="utf-8")
    return place


def logitwise(place: Path, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "logitwise", *words], cwd=place, capture_output=True, text=True, env=environment, **more
    )


SMALL = ["--bits", "3", "--group-size", "16", "--rows", "12", "--row-tokens", "32", "--held-out", "4", "--steps", "4"]


def test_quantize_evaluate_inspect(place: Path) -> None:
    made = logitwise(place, "quantize", "model", "out", *SMALL, "--calibration", "text:text.txt", "--set", "checks=2")
    assert made.returncode == 0, made.stderr
    assert "out:" in made.stdout
    assert 'from_pretrained("out")' in made.stdout
    assert "held-out KL" in made.stdout
    assert "Fitting blocks" in made.stderr
    assert "Traceback" not in made.stderr
    words = ["evaluate", "out", "--reference", "model", "--text", "text.txt", "--row-tokens", "32", "--rows", "8"]
    measured = logitwise(place, *words, "--json", "figures.json", "-q")
    assert measured.returncode == 0, measured.stderr
    assert measured.stderr == ""
    figures = json.loads((place / "figures.json").read_text("utf-8"))
    assert figures["kl"]["mean"] > 0
    assert 0 < figures["reference_perplexity"]["mean"] < figures["perplexity"]["mean"] * 2
    assert figures["kl"]["standard_error"] > 0
    assert figures["tokens"] == 8 * 32 - 8 or figures["tokens"] <= 8 * 32
    assert figures["bits_per_weight"] == pytest.approx(3 + 19 / 16)
    assert set(figures) >= {"perplexity", "kl", "top1", "tokens", "bits_per_weight", "bits_per_parameter", "size_bytes"}
    inspected = logitwise(place, "inspect", "out", "-v")
    assert inspected.returncode == 0, inspected.stderr
    assert "3 bits, groups of 16, asymmetric, float16 scales" in inspected.stdout
    assert "14 tensors in 3 bits" in inspected.stdout
    assert "model.layers.1.mlp.down_proj.weight" in inspected.stdout
    words = ["compare", "model", "out", "--report", "report.html", "--tasks", "problems", "--answer-tokens", "8"]
    compared = logitwise(place, *words)
    assert compared.returncode == 0, compared.stderr
    assert "1. out agrees with full precision on the likeliest next token at" in compared.stdout
    assert "| out |" in compared.stdout
    assert "out: answers" in compared.stderr
    assert (place / "report.html").is_file()
    assert json.loads((place / "report.json").read_text("utf-8"))["conditions"]["tasks"]["count"] == 60


def test_compare_with_what_is_served(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with serving(Engine(model, tokenizer(), names=("m", "other"), prompt_logprobs=True, most=20)) as url:
        words = ["compare", "model", "--server", f"{url}#m", "--report", "served.html", "--answer-tokens", "8"]
        compared = logitwise(place, *words)
    assert compared.returncode == 0, compared.stderr
    assert "m: prompts go to" in compared.stderr
    assert re.search(r"^\| m \| - \| - \| ≥ ", compared.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["quantize", "nowhere/at/all", "x"], "does not exist"),
        (["quantize", "model", "model"], "already exists"),
        (["quantize", "model", "x", "--bits", "9"], "bits = 9 is not possible"),
        (["quantize", "model", "x", "--group-size", "25"], "do not divide|inputs"),
        (["quantize", "model", "x", "--set", "stepps=3"], "did you mean steps"),
        (["quantize", "model", "x", "--recipe", "standart"], "did you mean standard"),
        (["quantize", "model", "x", "--per-channel", "--group-size", "16"], "exclude each other"),
        (["quantize", "model", "x", "--per-channel", "--set", "group_size=16"], "group_size is given twice"),
        (["quantize", "model", "x", "--bits", "3", "--set", "bits=2"], "bits is given twice"),
        (["quantize", "model", "x", "--calibration", "text:none.txt"], "none.txt"),
        (["quantize", "model", "x", "--stepz", "3"], "stepz"),
        (["quantize", "model", "x", "--seed", "9999999999999999999"], "seed = 9999999999999999999 is not possible"),
        (["quantize", "model", "model", "--overwrite"], "model is read, and would be removed"),
        (["quantize", "model", "x", "--calibration", "text:text.txt", "--log", "no/log"], "there is no folder"),
        (["evaluate", "model", "--text", "text.txt", "--json", "no/figures.json"], "there is no folder"),
        (["evaluate", "model"], "no text to evaluate on"),
        (["compare", "model", "--report", "x.html"], "no quantized model was given"),
        (["compare", "model", "--report", "x.html", "--server", "http://127.0.0.1:9/v1"], "does not answer"),
        (["compare", "model", "model", "--report", "x.txt"], "no name for a page"),
        (["compare", "model", "model", "--report", "x.html", "--tasks", "none.jsonl"], "none.jsonl"),
        (["compare", "model", "model", "--report", "x.html", "--seed", "18446744073709551616"], "seed is 18446744"),
        (["compare", "model", "model", "--report", "x.html", "--temperature", "nan"], "temperature is nan"),
        (["compare", "model", "--report", "x.html", "--server", "http://localhost:80o0/v1"], "no address of a server"),
        (["evaluate", "model", "--text", "text.txt", "--json", "text.txt"], "it is read, and would be lost"),
        (["evaluate", "model", "--text", "text.txt", "--rows", "0"], "rows is 0"),
        (["evaluate", "model", "--text", "text.txt", "--row-tokens", "0"], "row_tokens is 0"),
        (["inspect", "nothing/here/now"], "does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    place: Path, words: list[str], what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, since to import everything takes longer than to refuse."""
    before = sorted(place.iterdir())
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["logitwise", *words])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # that of the tests stays
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said, errors = capfd.readouterr()
    assert re.search(what, errors), errors
    assert "do:" in errors
    assert said == ""
    assert sorted(place.iterdir()) == before


def test_a_mistake_ends_the_process_without_a_traceback(place: Path) -> None:
    done = logitwise(place, "quantize", "nowhere/at/all", "x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 3 and done.stderr.startswith("logitwise: nowhere/at/all does not exist")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_no_output_and_goes_on(place: Path, sent: signal.Signals, code: int) -> None:
    words = [sys.executable, "-m", "logitwise", "quantize", "model", f"cut{code}", *SMALL, "--steps", "4000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*words, "--calibration", "text:text.txt"],
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Where the tests run in the background, the interrupt is ignored and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    run = place / f"cut{code}.run"
    for _ in range(600):
        if run.exists() and list(run.glob("*.json")):
            break
        time.sleep(0.1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (place / f"cut{code}").exists()
    assert not list(place.glob("cut*.tmp*"))
    assert run.exists()


def test_the_readme_shows_commands_that_exist() -> None:
    """Every `logitwise` command of the README and of its pages parses: its options are those of the command line."""
    from typer.main import get_command

    from logitwise.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    code = "\n".join(part for page in pages for part in page.read_text("utf-8").split("```")[1::2])
    lines = re.findall(r"^logitwise (\w+)(.*)$", code, re.M)
    assert {name for name, _ in lines} >= {"quantize", "evaluate", "inspect"}
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts}
        assert set(re.findall(r"(?<!\S)--?[a-z-]+", rest)) <= known, rest


def test_the_versions_are_shown(place: Path) -> None:
    done = logitwise(place, "--version")
    assert done.returncode == 0, done.stderr
    packages = [line.split(" ", 1)[0] for line in done.stdout.splitlines()]
    assert packages[0] == "logitwise"
    assert {"python", "torch", "transformers"} <= set(packages)


def test_every_option_of_quantize_is_a_recipe_key_or_a_matter_of_the_run() -> None:
    from typer.main import get_command

    from logitwise.cli import app

    names = {parameter.name for parameter in get_command(app).commands["quantize"].params}  # type: ignore[attr-defined]
    run = {"model", "out", "per_channel", "recipe", "settings", "revision", "overwrite", "fresh", "keep_run", "strict"}
    run |= {"no_verify", "dry_run"}
    assert names - run - {"quiet", "verbose", "log"} <= set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("command", "preset", "some"),
    [
        ("quantize", None, {"bits", "seed"}),
        ("refit", REFIT, {"rows", "row_tokens", "held_out", "steps", "polish_steps"}),
    ],
)
def test_the_defaults_that_help_names_are_those_of_the_recipe(command: str, preset: str | None, some: set[str]) -> None:
    recipe, named = Recipe.load(preset), {}
    for option in get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        if default := re.search(r"\((\d+)\)\.$", getattr(option, "help", None) or ""):
            named[option.name] = int(default[1])
    assert some <= named.keys()
    assert named == {name: getattr(recipe, name) for name in named}
