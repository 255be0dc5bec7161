"""What to do: every option of a run, frozen, with unknown keys refused.

Presets and the settings of each method are TOML files in `recipes/`. A recipe is made of the defaults, then a preset or
a file, then single keys: later ones win. What a preset or file says of its method, objective or polish falls with it.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from logitwise.errors import RecipeError
from logitwise.grid import Grid

PRESETS = ("quick", "standard", "best", "whole", "demo")

FALLS_WITH = {
    "method": ("learning", "learning_last"),
    "objective": ("objective_settings",),
    "polish": ("polish_steps", "polish_batch", "polish_learning", "polish_rows", "polish_fresh"),
}
"""By choice: the keys of a preset or file that mean nothing where another choice is asked for than its own."""


@dataclass(frozen=True)
class Choice:
    """A value that logitwise chose itself, and why."""

    value: Any
    why: str


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _count_or_all(value: Any) -> int | str:
    if value == "all":
        return "all"
    if str(value).isdecimal() and int(value) >= 1:
        return int(value)
    raise ValueError("it should be a number of at least 1, or all")


REWRITES = ("awq", "dual_scale")
"""Exact rewrites of the model, in the order in which they are applied."""


def _in_order(value: Any) -> Any:
    """Names of rewrites, perhaps in one string, in their order and once each."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    known = isinstance(names, list | tuple) and all(name in REWRITES for name in names)
    return tuple(name for name in REWRITES if name in names) if known else names


class Learning(_Frozen):
    """How the parameters of one role are learned."""

    optimizer: Literal["adam", "sign_sgd"]
    rate: float = Field(gt=0, description="learning rate at the first step, of `per`")
    per: Literal["step", "fit"] = Field("step", description="'fit': the rate is divided by the number of steps")
    schedule: Literal["cosine", "linear", "constant"]
    end: float = Field(0, ge=0, le=1, description="share of the rate that a schedule falls to")

    @model_validator(mode="after")
    def _falls(self) -> "Learning":
        if self.schedule == "constant" and self.end:
            raise ValueError("a constant rate falls to no end")
        return self


class Recipe(_Frozen):
    """Every option of a run. The command line's options have the same names."""

    bits: int = Field(4, ge=2, le=8, description="bits a weight")
    group_size: int | None = Field(64, ge=8, description="weights that share a scale; None: one scale a channel")
    symmetric: bool = Field(False, description="fixed zero point in the middle of the range")
    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="type of stored scales")
    format: str = Field("auto", description="checkpoint format, or auto")
    keep: tuple[str, ...] = Field((), description="patterns of weights to leave in full precision")

    rewrites: Annotated[tuple[Literal["awq", "dual_scale"], ...], BeforeValidator(_in_order)] = Field(
        (), description="exact rewrites of the model before it is quantized: awq, dual_scale"
    )
    method: str = Field("flexround", description="how weights are learned")
    objective: str = Field("lfq", description="what the final blocks are fitted by")
    objective_settings: dict[str, Any] = Field({}, description="of the objective: temperature, k, share, prompts")
    final_blocks: Annotated[int | Literal["all"], BeforeValidator(_count_or_all)] = Field(
        1, description="blocks at the end that are fitted together by the objective, or all"
    )
    shrink: bool = Field(False, description="then fit the final blocks again without the first of them, and so on")
    teacher_last: Literal["full_precision", "quantized"] = Field(
        "full_precision", description="what the final blocks' teacher reads: its own stream, or the student's"
    )
    left_out: float = Field(
        0.0, ge=0, lt=0.5, description="share of the largest errors that fits by mean squared error leave out"
    )
    window: int = Field(1, ge=1, description="blocks that are fitted together by mean squared error")
    stride: int = Field(1, ge=1, description="blocks from one window to the next, at most `window`")
    grow: bool = Field(False, description="the first windows grow from one block")
    start: str = Field("searched", description="where a fit starts")
    start_last: Literal["start", "mse"] = Field(
        "start", description="where the final blocks start: as the others, or at their own MSE fit"
    )
    choose_last: Literal["held_out", "batch", "last"] = Field(
        "held_out",
        description="which iterate of the final blocks is kept: the best on held-out rows, where it is better than the "
        "MSE fit; or, in any case, the best on its own step's batch, as AutoRound does, or the last",
    )
    learning: dict[str, Learning] | None = Field(None, description="by role; None: the method's own")
    learning_last: dict[str, Learning] | None = Field(None, description="of the final blocks; None: as `learning`")

    calibration: str = Field("self", description="self, self:FILE, server:URL, text:FILE, jsonl:FILE, hf:NAME")
    temperature: float = Field(1.0, ge=0, description="of the sampling of calibration text; 0: the likeliest token")
    rows: int = Field(256, ge=1, description="calibration rows")
    rows_last: int | None = Field(None, ge=1, description="calibration rows of the final blocks; None: as `rows`")
    row_tokens: int = Field(512, ge=8, description="tokens a row")
    held_out: int | None = Field(None, ge=0, description="rows that choose; None: an eighth, at least 16; 0: none")
    steps: int = Field(300, ge=0, description="optimiser steps a block")
    steps_last: int | None = Field(None, ge=0, description="steps of the final blocks; None: as `steps`")
    batch: int = Field(8, ge=1, description="rows a step")
    fresh_last: bool = Field(
        False, description="write new rows while the final blocks are fitted, until held-out KL is flat"
    )
    batch_last: int | None = Field(None, ge=1, description="rows a step of the final blocks; None: as `batch`")
    checks: int = Field(10, ge=1, description="how often held-out rows are asked while a block is fitted")

    polish: bool = Field(False, description="tune all scales, norms and biases together after the blocks")
    polish_steps: int = Field(300, ge=1, description="optimiser steps of the polish")
    polish_batch: int | None = Field(None, ge=1, description="rows a step of the polish; None: as `batch`")
    polish_learning: dict[str, Learning] | None = Field(None, description="of scales and vectors; None: as shipped")
    polish_rows: int | None = Field(None, ge=1, description="calibration rows of the polish; None: all there are")
    polish_fresh: bool = Field(False, description="write new rows while the polish goes on, until held-out KL is flat")

    seed: int = Field(0, ge=0)
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="type blocks are computed in")

    @property
    def grid(self) -> Grid:
        """The grid of every quantized weight."""
        return Grid(self.bits, self.group_size, self.symmetric, getattr(torch, self.scale_dtype))

    @property
    def held_out_rows(self) -> int:
        """Rows set aside to choose by."""
        return max(16, self.rows // 8) if self.held_out is None else self.held_out

    def learning_of(self, role: str, last: bool = False) -> Learning:
        """How a role of the method is learned: the recipe's own settings, else the method's file."""
        if last and self.learning_last and role in self.learning_last:
            return self.learning_last[role]
        if self.learning and role in self.learning:
            return self.learning[role]
        return Learning.model_validate(_shipped(self.method)["learning"][role])

    def polish_learning_of(self, role: str) -> Learning:
        """How a role of the polish is learned: the recipe's own settings, else those that are shipped."""
        if self.polish_learning and role in self.polish_learning:
            return self.polish_learning[role]
        return Learning.model_validate(_shipped("polish")["learning"][role])

    @classmethod
    def load(cls, preset: str | Path | None = None, /, **changes: Any) -> "Recipe":
        """A preset's or file's recipe (default: `standard`), with `changes` on top.

        Its settings of a method, objective or polish that `changes` replace are left out; see `FALLS_WITH`.

        Errors: RecipeError, naming the nearest key for one that is unknown.
        """
        settings = _shipped("standard") if preset is None else _read(preset)
        for choice, own in FALLS_WITH.items():
            if settings.get(choice) and changes.get(choice, settings[choice]) != settings[choice]:
                settings = {key: value for key, value in settings.items() if key not in own}
        return cls.of({**settings, **changes})

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Recipe":
        """A recipe of plain settings.

        Errors: RecipeError for unknown keys and values out of range.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise _explained(error) from error

    def but(self, **changes: Any) -> "Recipe":
        """The same with some settings changed."""
        return self.of({**self.model_dump(), **changes})


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs of the command line; values are read as TOML, else taken as text.

    Errors: RecipeError for a pair without `=`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set {pair} has no value", "it is read as key=value", "write --set steps=100, say")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = None if value.strip().lower() == "none" else value.strip()
    return settings


def _shipped(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files("logitwise") / "recipes" / f"{name}.toml").read_text("utf-8"))


def _read(preset: str | Path) -> dict[str, Any]:
    if str(preset) in PRESETS:
        return _shipped(str(preset))
    try:
        return tomllib.loads(Path(preset).read_text("utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(preset), PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"no recipe {preset}{hint}",
            f"it is neither a preset ({', '.join(PRESETS)}) nor a file",
            "name a preset or the path of a TOML file",
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {preset} cannot be read", str(error), "mend the file; it is TOML") from error


def not_possible(place: str, error: ValidationError, remedy: str) -> RecipeError:
    """What is said of the value of a key, `place`, that pydantic did not take."""
    first = error.errors()[0]
    reason = first["msg"].replace("Input should", "it should").removeprefix("Value error, ")
    return RecipeError(f"{place} = {first['input']!r} is not possible", reason[:1].lower() + reason[1:], remedy)


def _explained(error: ValidationError) -> RecipeError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list((Recipe if len(first["loc"]) == 1 else Learning).model_fields)
        near = _nearest(str(first["loc"][-1]), known)
        return RecipeError(
            f"unknown recipe key {place}",
            "no option has that name",
            f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}",
        )
    field = Recipe.model_fields.get(str(first["loc"][0]))
    known_as = f"; {place} is: {field.description}" if field and field.description else ""
    return not_possible(place, error, f"change it{known_as}")


def _nearest(wrong: str, known: list[str]) -> list[str]:
    """The known key of the same words in another order, or of the most similar letters."""
    same = [key for key in known if sorted(key.split("_")) == sorted(wrong.split("_"))]
    return same or difflib.get_close_matches(wrong, known, 1, cutoff=0.5)
