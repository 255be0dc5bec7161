"""What all models are asked: prompts to answer, and problems with a right answer. Read and refused before any work."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from logitwise.calibration.chat import prompt_ids
from logitwise.calibration.prompts import prompts_of_file
from logitwise.calibration.text import lines_of_file, parse
from logitwise.errors import CalibrationError, RecipeError
from logitwise.measure.problems import make_problems
from logitwise.measure.tasks import EXTRACTORS, Problem

OWN_PROBLEMS = "problems"
PROBLEM_COUNT = 60
DEFAULT_EXTRACTOR = "last-number"


@dataclass(frozen=True)
class Asked:
    """The questions.

    Args:
        prompts: whose answers are compared.
        prompts_from, tasks_from: where they are from, in words; no tasks are None.
        problems: with a right answer each.
        extractor: what finds the answer in a text.
    """

    prompts: list[str]
    prompts_from: str
    problems: list[Problem] = field(default_factory=list)
    tasks_from: str | None = None
    extractor: str = DEFAULT_EXTRACTOR


def read_asked(prompts: str | Path | None, tasks: str | Path | None, extractor: str | None, seed: int) -> Asked:
    """Prompts and problems.

    Args:
        prompts: a file, one prompt a line or JSON lines; None: those that ship here, which no calibration has.
        tasks: JSON lines of prompt and answer, or `problems`, made from the seed; None: no tasks.
        extractor: a name of EXTRACTORS; the last number by default.

    Errors: CalibrationError where a file cannot be read, with the line; RecipeError for an extractor that is unknown,
    or has no tasks.
    """
    if extractor is not None and tasks is None:
        raise RecipeError(f"extractor {extractor!r} has no tasks", "it reads answers to problems", "give tasks too")
    extractor = extractor or DEFAULT_EXTRACTOR
    if extractor not in EXTRACTORS:
        known = ", ".join(EXTRACTORS)
        raise RecipeError(f"extractor {extractor!r} is unknown", f"known are {known}", "choose one of them")
    if prompts is None:
        text = files("logitwise.comparison").joinpath("prompts.txt").read_text(encoding="utf-8")
        asked, origin = text.splitlines(), "the package's own, which no calibration uses"
    else:
        asked, origin = prompts_of_file(Path(prompts)), Path(prompts).name
    if tasks is None:
        return Asked(asked, origin)
    if str(tasks) == OWN_PROBLEMS:
        return Asked(asked, origin, make_problems(PROBLEM_COUNT, seed), "arithmetic made from the seed", extractor)
    return Asked(asked, origin, read_problems(Path(tasks)), Path(tasks).name, extractor)


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file of JSON lines: `prompt` (or `question`) and `answer`.

    Errors: CalibrationError, with the line, where the file or one of its lines cannot be read.
    """
    problems = []
    for place, line in lines_of_file(path):
        entry, why = None, "a line needs the keys prompt and answer, each with a text"
        try:
            entry = parse(line)
        except ValueError as error:
            why = str(error)
        prompt = (entry.get("prompt") or entry.get("question")) if isinstance(entry, dict) else None
        answer = entry.get("answer") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not isinstance(answer, str | int | float):
            raise CalibrationError(f"{place} is no problem", why, "write one JSON object a line: prompt and answer")
        problems.append(Problem(prompt, str(answer)))
    return problems


def as_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, prompts: list[str]) -> list[list[int]]:
    """What a model reads before it answers each prompt.

    Errors: CalibrationError where one leaves no room for an answer in the model's positions.
    """
    found = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(found, key=len, default=[])
    if room is not None and len(longest) >= room:
        raise CalibrationError(
            f"a prompt of {len(longest)} tokens leaves no room for an answer",
            f"the model has {room} positions; it begins {prompts[found.index(longest)][:60]!r}",
            "shorten the longest prompts",
        )
    return found
