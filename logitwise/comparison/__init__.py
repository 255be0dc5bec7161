"""`compare`: what quantization does to the text a model writes, on one page.

asked        prompts and problems                    candidates   the models, found to belong together
written      what each of them answers               teacher      full precision's pass, made once, and the others'
findings     figures as JSON values                  scores       problems solved

Two ways of looking: on full precision's own answers each model is asked for every next token (teacher-forced), and each
model answers by itself. The first sees small damage, the second what it adds up to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from logitwise.comparison.asked import Asked, as_tokens, read_asked
from logitwise.comparison.candidates import Candidate, open_candidates
from logitwise.comparison.findings import Json, answer_findings, as_json, side_by_side, token_findings
from logitwise.comparison.scores import marks, sampled_findings, task_findings
from logitwise.comparison.teacher import beside, rows_of, teach
from logitwise.comparison.written import Answers, Manner, write_answers
from logitwise.errors import RecipeError
from logitwise.evaluation import size_of
from logitwise.machine import choose_machine, versions
from logitwise.measure.divergence import VERSION
from logitwise.recipe import Recipe
from logitwise.report.files import check_places, write_report
from logitwise.report.sentences import sentences
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton
from logitwise.watch import SILENT, Watcher

SHOWN = 24
"""Prompts whose answers stand side by side in the report."""

SAMPLE_TEMPERATURE = 0.8


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
    quantized: Sequence[str | Path],
    *,
    report: str | Path,
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
        quantized: one or more checkpoints made of it.
        report: the .html file to write; an older one is replaced when the new one is complete.
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
    candidates = open_candidates(original, quantized, revision, watcher)
    folder = RunFolder(page.with_suffix(".run"))
    if fresh:
        folder.remove()
    manner = Manner(answer_tokens, 0.0, seed, machine["device"], machine["compute_dtype"])
    work = _Work(candidates, asked, manner, folder, watcher)
    answers = work.answers()
    rows_by = work.answers_of(candidates[0], replace(manner, temperature=temperature)) if temperature else answers[0]
    tokens = work.tokens(rows_by)
    solved = work.scores(samples) if asked.problems else [None] * len(candidates)
    models = [
        {
            "name": candidate.name,
            "original": place == 0,
            "size": as_json(size_of(candidate.source)),
            "tokens": tokens["models"][place - 1] if place else None,
            "answers": as_json(answer_findings(answers[place], answers[0], work.texts, work.tokenizer)),
            "tasks": solved[place],
        }
        for place, candidate in enumerate(candidates)
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
        "answers": side_by_side(answers[0], answers[1:], asked.prompts, work.tokenizer)[:SHOWN],
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


class _Work:
    """The steps of one comparison, each of which the run folder keeps."""

    def __init__(
        self, candidates: list[Candidate], asked: Asked, manner: Manner, folder: RunFolder, watcher: Watcher
    ) -> None:
        self.candidates, self.asked, self.manner = candidates, asked, manner
        self.folder, self.watcher = folder, watcher
        reference = candidates[0].source
        self.tokenizer = reference.tokenizer()
        self.prompts = as_tokens(self.tokenizer, reference.config, asked.prompts)
        self.problems = as_tokens(self.tokenizer, reference.config, [problem.prompt for problem in asked.problems])
        self.texts = [str(self.tokenizer.decode(ids)) for ids in self.prompts]

    def answers_of(self, candidate: Candidate, manner: Manner) -> Answers:
        return write_answers(candidate, self.tokenizer, self.prompts, manner, self.folder, self.watcher)

    def answers(self) -> list[Answers]:
        """Every model's greedy answers to the prompts."""
        return [self.answers_of(candidate, self.manner) for candidate in self.candidates]

    def tokens(self, answers: Answers) -> Json:
        """Every other model's probabilities on full precision's answers, and those of full precision in bfloat16."""
        original, device = self.candidates[0], torch.device(self.manner.device)
        skeleton = Skeleton(original.source, device, torch.float32)
        with self.watcher.stage("Proving the replay", 1) as stage:
            skeleton.prove()
            stage.advance()
        teacher = teach(original, rows_of(self.prompts, answers.ids), skeleton, self.folder, self.watcher)
        head = skeleton.head(original.source)

        def measure(candidate: Candidate, through: Skeleton) -> Json:
            found = beside(teacher, head, candidate, through, self.folder, self.watcher)
            return token_findings(found, teacher, answers.ends, self.tokenizer)

        noisy = Skeleton(original.source, device, torch.bfloat16)
        noise = measure(replace(original, name=f"{original.name} in bfloat16"), noisy)
        return {
            "noise": {**noise, "stored_kl": as_json(teacher.stored_kl)},
            "models": [measure(candidate, skeleton) for candidate in self.candidates[1:]],
            "count": len(teacher.written),
        }

    def scores(self, samples: int) -> list[Json]:
        """Every model's problems solved, by greedy answers, and by sampled ones where they are asked for."""
        found, greedy = [], list[list[bool]]()
        for candidate in self.candidates:
            written = self._solve(candidate, self.problems, self.manner, "problems")
            greedy.append(marks(written, self.asked, self.tokenizer))
            scored = task_findings(greedy[-1], greedy[0], self.manner.seed)
            if samples:
                manner = replace(self.manner, temperature=SAMPLE_TEMPERATURE)
                tried = [problem for problem in self.problems for _ in range(samples)]
                drawn = marks(self._solve(candidate, tried, manner, "samples"), self.asked, self.tokenizer)
                scored["pass_at_k"] = {"temperature": SAMPLE_TEMPERATURE, "values": sampled_findings(drawn, samples)}
            found.append(scored)
        return found

    def _solve(self, candidate: Candidate, problems: list[list[int]], manner: Manner, title: str) -> Answers:
        return write_answers(candidate, self.tokenizer, problems, manner, self.folder, self.watcher, title)
