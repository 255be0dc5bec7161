"""What to do: every option of a run, frozen, with unknown keys refused.

Presets and the settings of each method are TOML files in `recipes/`. A recipe is made of the defaults, then a preset or
a file, then single keys: later ones win. What a preset or file says of its method, objective or polish falls with it.
"""

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from logitwise.errors import RecipeError
from logitwise.grid import Grid

PRESETS = ("quick", "standard", "best", "whole", "demo")

REFIT = "refit"
"""The preset of `refit`, which reads other keys than `quantize`."""

FALLS_WITH = {
    "method": ("learning", "learning_last", "stages"),
    "objective": ("objective_settings",),
    "polish": ("polish_steps", "polish_batch", "polish_learning", "polish_rows", "polish_fresh"),
}
"""By choice: the keys of a preset or file that mean nothing where another choice is asked for than its own."""


MOST_SEED = 2**62 - 1
"""What every generator takes, and has room to be added to."""


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


def _size_or_channel(value: Any) -> Any:
    """TOML has no None: a recipe's file says `channel`, as a layer's grid does."""
    return None if value == "channel" else value


class Learning(_Frozen):
    """How the parameters of one role are learned."""

    optimizer: Literal["adam", "sign_sgd", "lion"]
    rate: float = Field(gt=0, description="learning rate at the first step, of `per`")
    per: Literal["step", "fit"] = Field("step", description="'fit': the rate is divided by the number of steps")
    schedule: Literal["cosine", "linear", "constant"]
    end: float = Field(0, ge=0, le=1, description="share of the rate that a schedule falls to")
    decay: float = Field(0, ge=0, description="decoupled weight decay of lion, of the rate")

    @model_validator(mode="after")
    def _falls(self) -> "Learning":
        if self.schedule == "constant" and self.end:
            raise ValueError("a constant rate falls to no end")
        return self

    @model_validator(mode="after")
    def _decays(self) -> "Learning":
        if self.decay and self.optimizer != "lion":
            raise ValueError(f"{self.optimizer} has no decay, lion has")
        return self


class BlockStage(_Frozen):
    """What of a block is learned first, and by which error; what no stage names is learned last, by the objective."""

    slots: tuple[str, ...] = Field(min_length=1, description="patterns of linear modules' names")
    at: Literal["own", "common"] = Field(
        description="where the squared error is taken: each at its own output, or at that of the module they share"
    )


class LayerGrid(_Frozen):
    """The grid of some layers, where it is another than the recipe's; what is left out is the recipe's."""

    bits: int | None = Field(None, ge=2, le=8)
    group_size: Annotated[int, Field(ge=8)] | Literal["channel"] | None = None
    symmetric: bool | None = None


class WindowSettings(_Frozen):
    """What is other than the recipe's in the fits by mean squared error of some windows.

    Args:
        blocks: those that end with one of these blocks, the first and the last of them; negative ones count from the
            end of the model.
    """

    blocks: tuple[int, int]
    steps: int | None = Field(None, ge=0)
    batch: int | None = Field(None, ge=1)
    rows: int | None = Field(None, ge=1)
    learning: dict[str, Learning] = {}

    def covers(self, block: int, depth: int) -> bool:
        """Whether windows that end with this block are meant."""
        first, last = (bound + depth if bound < 0 else bound for bound in self.blocks)
        return first <= block <= last


class Recipe(_Frozen):
    """Every option of a run. The command line's options have the same names."""

    bits: int = Field(4, ge=2, le=8, description="bits a weight")
    group_size: Annotated[int | None, BeforeValidator(_size_or_channel)] = Field(
        64, ge=8, description="weights that share a scale; channel, or None: one scale a channel"
    )
    symmetric: bool | None = Field(
        None,
        description="fixed zero point in the middle of the range; None: not, but where layers differ in their grid, "
        "since transformers loads those only so",
    )
    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="type of stored scales")
    format: str = Field("auto", description="checkpoint format, or auto")
    keep: tuple[str, ...] = Field(
        (), description="patterns of layers' names, or of parts of them, to leave in full precision"
    )
    layers: dict[str, LayerGrid] = Field({}, description="other grids by pattern of a layer's name; later ones win")
    target_bits: float | None = Field(
        None, ge=2, le=9, description="bits a quantized weight on average, scales included, given where they matter"
    )
    sensitivity: Literal["kl", "lim", "zd", "even"] = Field(
        "kl",
        description="where bits matter: by KL with one layer quantized, or by cheap scores of whole blocks; even: "
        "nowhere, as a control",
    )

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
    windows: tuple[WindowSettings, ...] = Field(
        (), description="steps, batch, rows and learning of single windows; later ones win"
    )
    start: str = Field("searched", description="where a fit starts")
    start_last: Literal["start", "mse"] = Field(
        "mse", description="where the final blocks start: at their own MSE fit, or where the others start"
    )
    choose_last: Literal["held_out", "batch", "last"] = Field(
        "held_out",
        description="which iterate of the final blocks is kept: the best on held-out rows, where it is better than the "
        "MSE fit; or, in any case, the best on its own step's batch, as AutoRound does, or the last",
    )
    learning: dict[str, Learning] | None = Field(None, description="by role; None: the method's own")
    learning_last: dict[str, Learning] | None = Field(None, description="of the final blocks; None: as `learning`")

    stages: tuple[BlockStage, ...] | None = Field(
        None,
        description="what of a block is learned before the rest, in order; None: the method's own; []: all at once",
    )

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

    seed: int = Field(0, ge=0, le=MOST_SEED)
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="type blocks are computed in")
    streams: Literal["auto", "device", "cpu", "disk"] = Field(
        "auto", description="where the hidden states of all rows are between two blocks"
    )

    @property
    def grid(self) -> Grid:
        """The grid of every quantized weight that `layers` does not name."""
        differ = bool(self.layers) or self.target_bits is not None
        symmetric = differ if self.symmetric is None else self.symmetric
        return Grid(self.bits, self.group_size, symmetric, getattr(torch, self.scale_dtype))

    def grid_of(self, module: str) -> Grid:
        """The grid of a layer, by the name of its module."""
        grid = self.grid
        for pattern, own in self.layers.items():
            if fnmatch(module, pattern):
                changes = own.model_dump(exclude_none=True)
                if own.group_size == "channel":
                    changes["group_size"] = None
                grid = replace(grid, **changes)
        return grid

    @property
    def candidates(self) -> tuple[int, ...]:
        """The bits that a layer may come to have: those around the target, and one more on either side."""
        if self.target_bits is None:
            return (self.bits,)
        around = max(2, int(self.target_bits - 8 * self.grid.scale_dtype.itemsize / (self.group_size or math.inf)))
        return tuple(range(max(2, around - 1), min(8, around + 2) + 1))

    def grids_of(self, module: str) -> tuple[Grid, ...]:
        """The grids that a layer may come to have, by the name of its module."""
        if self.target_bits is None:
            return (self.grid_of(module),)
        return tuple(replace(self.grid, bits=bits) for bits in self.candidates)

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

    @property
    def most_rows(self) -> int:
        """Calibration rows that the fits read, at most."""
        return max(self.rows, self.rows_last or 0, *(own.rows or 0 for own in self.windows))

    @property
    def writes_on(self) -> bool:
        """Whether text is written while blocks are learned."""
        return self.fresh_last or self.polish_fresh

    @property
    def block_stages(self) -> tuple[BlockStage, ...]:
        """What of a block is learned before the rest: the recipe's own stages, else the method's file's."""
        if self.stages is not None:
            return self.stages
        return tuple(BlockStage.model_validate(stage) for stage in _shipped(self.method).get("stages", []))

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
    if str(preset) in (*PRESETS, REFIT):
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
        tables: dict[str, type[BaseModel]] = {"layers": LayerGrid, "windows": WindowSettings, "stages": BlockStage}
        inner = tables.get(str(first["loc"][0]), Learning) if len(first["loc"]) < 4 else Learning
        known = list((Recipe if len(first["loc"]) == 1 else inner).model_fields)
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
