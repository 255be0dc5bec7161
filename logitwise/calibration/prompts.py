"""Prompts for the model to answer: those that ship with the package, or a file's."""

import random
import tomllib
from importlib.resources import files
from pathlib import Path

from logitwise.calibration.text import lines_of_file, parse
from logitwise.errors import CalibrationError

PATIENCE = 1000  # draws in a row that bring nothing new before the prompts count as used up


class Draw(dict[str, str]):
    """The fields of one template, drawn as it asks: a word once (a name stays that person), a number each time."""

    def __init__(self, words: dict[str, list[str]], numbers: dict[str, list[int]], generator: random.Random) -> None:
        super().__init__()
        self.words, self.numbers, self.generator = words, numbers, generator

    def __missing__(self, field: str) -> str:
        if field in self.numbers:
            return str(self.generator.randint(*self.numbers[field]))
        return self.setdefault(field, self.generator.choice(self.words[field]))


def shipped_prompts(count: int, seed: int) -> list[str]:
    """`count` different prompts of the package's own, every kind (prompts.toml) equally likely; the seed decides which.

    Errors: CalibrationError where so many different ones do not exist.
    """
    data = tomllib.loads(files("logitwise.calibration").joinpath("prompts.toml").read_text(encoding="utf-8"))
    kinds: list[list[str]] = list(data["kinds"].values())
    generator = random.Random(seed)
    prompts: dict[str, None] = {}
    repeats = 0
    while len(prompts) < count and repeats < PATIENCE:
        template = generator.choice(generator.choice(kinds))
        prompt = template.format_map(Draw(data["fields"], data["numbers"], generator))
        repeats = repeats + 1 if prompt in prompts else 0
        prompts[prompt] = None
    if len(prompts) < count:
        raise CalibrationError(
            f"{count} prompts are more than the package has",
            f"only {len(prompts)} different ones were found",
            "give prompts of your own with --calibration self:FILE",
        )
    return list(prompts)


def prompts_of_file(path: Path) -> list[str]:
    """The prompts of a file in its order: one a line, or JSON lines with the key `prompt`; empty lines separate.

    Errors: CalibrationError, with the line, where the file or one of its lines cannot be read.
    """
    return [
        prompt_of_json(place, line) if line.lstrip().startswith("{") else line.strip()
        for place, line in lines_of_file(path)
    ]


def prompt_of_json(place: str, line: str) -> str:
    """The prompt in one JSON line."""
    try:
        record = parse(line)
    except ValueError as error:
        raise CalibrationError(
            f"{place} is not JSON",
            f"it begins with a brace, but {error}",
            "write one prompt a line, or one JSON object with the key prompt",
        ) from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise CalibrationError(
            f"{place} has no prompt",
            "a JSON line of prompts needs the key prompt with a text",
            "write one prompt a line, or one JSON object with the key prompt",
        )
    return prompt
