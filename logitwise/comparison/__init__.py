"""`compare`: what quantization does to the text a model writes, on one page.

asked        prompts and problems                    candidates   the models, found to belong together
written      what each of them answers               teacher      full precision's pass, made once, and the others'
served       a model behind a server                 asking       the same of it (replies: as servers write it)
findings     figures as JSON values                  scores       problems solved
work         all of these for the models of one comparison

Two ways of looking: on full precision's own answers each model is asked for every next token (teacher-forced), and each
model answers by itself. The first sees small damage, the second what it adds up to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from logitwise.comparison.asked import read_asked
from logitwise.comparison.candidates import open_candidates
from logitwise.comparison.findings import Json, as_json, served_findings, side_by_side
from logitwise.comparison.served import Served
from logitwise.comparison.work import Work
from logitwise.comparison.written import Manner
from logitwise.errors import RecipeError
from logitwise.evaluation import size_of
from logitwise.machine import choose_machine, versions
from logitwise.measure.divergence import VERSION
from logitwise.recipe import Recipe
from logitwise.report.files import check_places, write_report
from logitwise.report.sentences import sentences
from logitwise.runfolder import RunFolder
from logitwise.watch import SILENT, Watcher

SHOWN = 24
"""Prompts whose answers stand side by side in the report."""


@dataclass(frozen=True)
class Compared:
    """A finished comparison.

    Args:
        report: the page.
        findings: all that is on it, as JSON values; also beside it as .json.
    """

    report: Path
    findings: dict[str, Any]


def compare(
    original: str | Path,
    quantized: Sequence[str | Path] = (),
    *,
    report: str | Path,
    servers: Sequence[str] = (),
    prompts: str | Path | None = None,
    tasks: str | Path | None = None,
    extractor: str | None = None,
    answer_tokens: int = 512,
    temperature: float = 0.0,
    samples: int = 0,
    seed: int = 0,
    device: str = "auto",
    revision: str | None = None,
    fresh: bool = False,
    watcher: Watcher = SILENT,
) -> Compared:
    """Compares quantized models with full precision and writes the report: REPORT.html, its figures as .json.

    What is finished is kept in REPORT.run, answers and full precision's hidden states among it: an interrupted
    comparison goes on, and one with a model more measures that model alone.

    Args:
        original: the full-precision model: a folder, a .gguf file or a hub id.
        quantized: checkpoints made of it; none are needed where there are servers.
        report: the .html file to write; an older one is replaced when the new one is complete.
        servers: addresses of OpenAI-compatible servers, up to /v1, each of which serves a model made of it; after a #,
            the model's id where there are several. What a server does not say is null in the findings.
        prompts: a file, one prompt a line or JSON lines with `prompt`; the package's own by default.
        tasks: JSON lines of `prompt` and `answer`, or "problems": arithmetic made from the seed.
        extractor: what finds an answer in a text, by its name in `measure.tasks.EXTRACTORS`; last-number by default.
        answer_tokens: the longest answer.
        temperature: of the full-precision answers that all are measured on; 0: its greedy ones.
        samples: answers sampled to each problem, for pass@k; 0: none.
        seed: of everything random.
        device: where to compute.
        revision: of a hub id of the original.
        fresh: reuse nothing of an earlier run.
        watcher: hears what is being done.

    Errors: InputError for what is refused before the work; MachineError where the machine fails, to be resumed.
    """
    page = Path(report)
    check_places(page)
    _check_numbers(answer_tokens, temperature, samples, tasks)
    machine = {name: choice.value for name, choice in choose_machine(Recipe.load(None, device=device)).items()}
    asked = read_asked(prompts, tasks, extractor, seed)
    reference, others = open_candidates(original, quantized, servers, revision, watcher)
    folder = RunFolder(page.with_suffix(".run"))
    if fresh:
        folder.remove()
    manner = Manner(answer_tokens, 0.0, seed, machine["device"], machine["compute_dtype"])
    work = Work(reference, others, asked, manner, folder, watcher)
    own, answers = work.answers()
    rows_by = work.write(reference, work.prompts, replace(manner, temperature=temperature)) if temperature else own
    tokens = work.tokens(rows_by)
    solved = work.scores(own.ends, samples) if asked.problems else [None] * (1 + len(others))
    models = [
        {
            "name": candidate.name,
            "original": candidate is reference,
            "size": None if isinstance(candidate, Served) else as_json(size_of(candidate.source)),
            "served": served_findings(candidate) if isinstance(candidate, Served) else None,
            "tokens": measured,
            "answers": as_json(work.answers_beside(candidate, written, own)),
            "tasks": scored,
        }
        for candidate, measured, written, scored in zip(
            [reference, *others], [None, *tokens["models"]], [own, *answers], solved, strict=True
        )
    ]
    conditions = {
        "metric": VERSION,
        "prompts": {"count": len(asked.prompts), "from": asked.prompts_from},
        "tasks": {"count": len(asked.problems), "from": asked.tasks_from, "extractor": asked.extractor}
        if asked.problems
        else None,
        "measured_on": {"answers": len(rows_by.ids), "tokens": tokens["count"], "temperature": temperature},
        "answer_tokens": answer_tokens,
        "samples": samples,
        "seed": seed,
        "device": machine["device"],
        "answers_dtype": machine["compute_dtype"],
        "measured_dtype": "float32",
        "versions": versions(),
    }
    findings: Json = {
        "version": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "conditions": conditions,
        "noise": tokens["noise"],
        "models": models,
        "answers": side_by_side(own, work.references(own), answers, asked.prompts, work.tokenizer)[:SHOWN],
    }
    findings["sentences"] = sentences(findings)
    write_report(page, findings)
    return Compared(page, findings)


def _check_numbers(answer_tokens: int, temperature: float, samples: int, tasks: object) -> None:
    """Refuses numbers that mean nothing.

    Errors: RecipeError.
    """
    for name, value, least in (
        ("answer_tokens", answer_tokens, 1),
        ("temperature", temperature, 0),
        ("samples", samples, 0),
    ):
        if value < least:
            raise RecipeError(f"{name} is {value}", f"it is at least {least}", "give another number")
    if samples and tasks is None:
        raise RecipeError("samples were asked for without tasks", "pass@k is of problems", "give tasks too")
