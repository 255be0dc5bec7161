"""`compare`: what quantization does to the text a model writes, on one page.

asked        prompts and problems                    candidates   the models, found to belong together
written      what each of them answers               teacher      full precision's pass, made once, and the others'
served       a model behind a server                 asking       the same of it (replies: as servers write it)
harness      lm_eval's tasks, loaded or refused      standard     what each of them scores in these
contained    lm_eval kept from the terminal
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
from logitwise.comparison.harness import load_tasks
from logitwise.comparison.served import Served
from logitwise.comparison.standard import standard_conditions
from logitwise.comparison.work import Work
from logitwise.comparison.written import Manner
from logitwise.errors import RecipeError
from logitwise.evaluation import size_of
from logitwise.machine import choose_machine, versions
from logitwise.measure.divergence import VERSION
from logitwise.recipe import MOST_SEED, Recipe
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
    lm_eval: str | Sequence[str] = (),
    lm_eval_limit: int | None = None,
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
        lm_eval: standard tasks that EleutherAI's lm_eval runs on every model but those of servers: its names of tasks,
            or paths of .yaml files or folders of them, one or more with commas between them.
        lm_eval_limit: how many documents of each of these, the first ones; all by default.
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
    check_places(page, *(place for place in (prompts, tasks) if place))
    _check_numbers(answer_tokens, temperature, samples, seed, tasks)
    standard = _named(lm_eval, lm_eval_limit)
    machine = {name: choice.value for name, choice in choose_machine(Recipe.load(None, device=device)).items()}
    asked = read_asked(prompts, tasks, extractor, seed)
    harness = load_tasks(standard, lm_eval_limit, watcher) if standard else None
    reference, others = open_candidates(original, quantized, servers, revision, watcher)
    folder = RunFolder(page.with_suffix(".run"))
    with folder.alone():
        if fresh:
            folder.empty()
        manner = Manner(answer_tokens, 0.0, seed, machine["device"], machine["compute_dtype"])
        work = Work(reference, others, asked, manner, folder, watcher)
        work.prove()
        own, answers = work.answers()
        rows_by = work.write(reference, work.prompts, replace(manner, temperature=temperature)) if temperature else own
        tokens = work.tokens(rows_by)
        solved = work.scores(own.ends, samples) if asked.problems else [None] * (1 + len(others))
        by_lm_eval = work.standard(harness) if harness else [None] * (1 + len(others))
        models = [
            {
                "name": candidate.name,
                "original": candidate is reference,
                "size": None if isinstance(candidate, Served) else as_json(size_of(candidate.source)),
                "served": served_findings(candidate) if isinstance(candidate, Served) else None,
                "tokens": measured,
                "answers": as_json(work.answers_beside(candidate, written, own)),
                "tasks": scored,
                "lm_eval": scored_by_lm_eval,
            }
            for candidate, measured, written, scored, scored_by_lm_eval in zip(
                [reference, *others], [None, *tokens["models"]], [own, *answers], solved, by_lm_eval, strict=True
            )
        ]
        conditions = {
            "metric": VERSION,
            "prompts": {"count": len(asked.prompts), "from": asked.prompts_from},
            "tasks": {"count": len(asked.problems), "from": asked.tasks_from, "extractor": asked.extractor}
            if asked.problems
            else None,
            "lm_eval": standard_conditions(harness) if harness else None,
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


def _check_numbers(answer_tokens: int, temperature: float, samples: int, seed: int, tasks: object) -> None:
    """Refuses numbers that mean nothing.

    Errors: RecipeError.
    """
    for name, value, least, most in (
        ("answer_tokens", answer_tokens, 1, None),
        ("temperature", temperature, 0, 100),
        ("samples", samples, 0, None),
        ("seed", seed, 0, MOST_SEED),
    ):
        if not value >= least or (most is not None and value > most):
            within = f"it is at least {least}" if most is None else f"it is from {least} to {most}"
            raise RecipeError(f"{name} is {value}", within, "give another number")
    if samples and tasks is None:
        raise RecipeError("samples were asked for without tasks", "pass@k is of problems", "give tasks too")


def _named(tasks: str | Sequence[str], limit: int | None) -> list[str]:
    """The tasks of lm_eval that are named.

    Errors: RecipeError where a limit means nothing.
    """
    listed = tasks.split(",") if isinstance(tasks, str) else tasks
    named = [name.strip() for name in listed if name.strip()]
    if tasks and not named:
        raise RecipeError("lm_eval was asked for no task", f"{tasks!r} names none", "name one, such as wikitext")
    if limit is not None and (limit < 1 or not named):
        why = "it is at least 1" if limit < 1 else "no task of lm_eval was asked for"
        raise RecipeError(f"lm_eval_limit is {limit}", why, "give another number, or leave it out")
    return named
