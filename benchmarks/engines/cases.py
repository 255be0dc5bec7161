"""The checkpoints that engines are asked about: every grid that a format holds, and files that are wrong."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path

import torch
from models import Small, llama, others
from torch import Tensor
from transformers import PretrainedConfig

from logitwise.formats import FORMATS, Format
from logitwise.formats.awq import PLACES
from logitwise.formats.gguf_file import file_of
from logitwise.grid import Grid, Quantized, codes_of, freeze, scale_of_range, split

Weights = Mapping[str, Tensor | Quantized]


@dataclass(frozen=True)
class Case:
    """A checkpoint to load.

    Args:
        format: its format, by name.
        model: what was quantized.
        grid: what its layers lie on; None where that is not known.
        loaded: what the engine loads: a folder or a .gguf file.
        right: what our forward reads; another where what is loaded is wrong, or dequantized.
        what: what is not as `logitwise quantize` writes it.
        wrong: whether it must miss the gate.
        dense: whether the engine finds no codes, only the weights that they stand for.
    """

    format: str
    model: str
    grid: Grid | None
    loaded: Path
    right: Path
    what: str = ""
    wrong: bool = False
    dense: bool = False


def cases(name: str, folder: Path) -> Iterator[Case]:
    """The checkpoints of a format, written into a folder as their turns come."""
    form = FORMATS[name]
    for grid in grids(form):
        yield from _of_grid(form, llama(), grid, folder)
    for several in mixtures(form):
        path = write(folder, form, llama(), on_grids(llama(), several))
        yield Case(form.name, llama().described.name, None, path, path, f"{several[0]}, then 2, 8 and 3 bits")
    yield from _unusual(form, llama(), folder)
    if name == "gguf":
        for model, grid in product(others(), KINDS):
            yield from _of_grid(form, model, grid, folder)
    yield from _wrong(form, llama(), folder)


KINDS = (Grid(3, 32, False), Grid(4, 32, True), Grid(4, 64, False), Grid(8, None, True))
"""A grid for each type of GGUF, with groups of each kind."""


def grids(form: Format) -> list[Grid]:
    """Every number of bits, size of groups and kind of zero point, with scales of 16 bits; some of other types."""
    every = list(product(range(2, 9), (32, 64, 128, None), (True, False)))
    found = [Grid(bits, size, symmetric) for bits, size, symmetric in every]
    exact = [Grid(bits, size, False, torch.float32) for bits, size, symmetric in every if not symmetric]
    # Where zero points need them, of any size; else where nothing but they is exact in transformers.
    needed = form.holds(Grid(4, 64, False)) is not None
    found += [grid for grid in exact if needed or grid.group_size == 64]
    found += [Grid(4, 64, True, torch.bfloat16)]
    return [grid for grid in found if form.holds_grids([grid]) is None]


def mixtures(form: Format) -> list[list[Grid]]:
    """Grids that layers of one checkpoint have in turn, where a format holds several."""
    sizes = [(4, 64), (2, 32), (8, 128), (3, 64)]
    kinds = [(True, torch.float16), (False, torch.float32)]
    found = [[Grid(bits, size, symmetric, dtype) for bits, size in sizes] for symmetric, dtype in kinds]
    return [several for several in found if form.holds_grids(several) is None]


RELABELLED = "v1 zero points labelled gptq_v2"
"""What is wrong with a file that nobody misreads who knows where the zero points of symmetric grids are."""


def _of_grid(form: Format, model: Small, grid: Grid, folder: Path) -> Iterator[Case]:
    """A model rounded to nearest; GGUF files also dequantized, since llama.cpp rounds activations beside codes."""
    weights = on_grids(model, [grid])
    path = write(folder, form, model, weights)
    case = Case(form.name, model.described.name, grid, path, path)
    yield case
    if form.name == "gguf":
        yield replace(case, loaded=write(folder, form, model, dequantized(weights)), what="dequantized", dense=True)


def _unusual(form: Format, model: Small, folder: Path) -> Iterator[Case]:
    """What fits come to and rounding does not: negative scales, and layers kept in full precision."""
    grid = Grid(4, 64, True)
    weights = on_grids(model, [grid])
    negative = {name: negated(weight) for name, weight in weights.items()}
    kept = {name: model.weights[name] if "layers.1.mlp" in name else weight for name, weight in weights.items()}
    for what, changed in (("half of the scales negative", negative), ("one block's MLP kept", kept)):
        path = write(folder, form, model, changed)
        yield Case(form.name, model.described.name, grid, path, path, what)


def _wrong(form: Format, model: Small, folder: Path) -> Iterator[Case]:
    """Files that are wrong in one way each."""
    grid = next(
        grid for grid in reversed(grids(form)) if grid.bits == 4 and grid.group_size == 64 and not grid.symmetric
    )
    weights = on_grids(model, [grid])
    right = write(folder, form, model, weights)
    case = Case(form.name, model.described.name, grid, right, right, wrong=True)
    moved = {name: off_by_one(weight) for name, weight in weights.items()}
    yield replace(case, loaded=write(folder, form, model, moved), what="zero points off by one")
    if form.name == "awq":
        mixed = {name: natural(weight) for name, weight in weights.items()}
        yield replace(case, loaded=write(folder, form, model, mixed), what="outputs of a word in their natural order")
    if form.name == "gguf":
        undone = {name: unpermuted(name, one, model.described.config) for name, one in dequantized(weights).items()}
        yield replace(case, loaded=write(folder, form, model, undone), what="rows of q and k not permuted", dense=True)
    if form.name == "gptq":
        symmetric = Grid(4, 64, True)
        weights = on_grids(model, [symmetric])
        case = replace(case, grid=symmetric, right=write(folder, form, model, weights))
        yield replace(case, loaded=relabelled(case.right, folder, "gptq_v2"), what=RELABELLED)
        moved = {name: codes_off_by_one(weight) for name, weight in weights.items()}
        yield replace(case, loaded=write(folder, form, model, moved), what="codes off by one")


def on_grids(model: Small, several: list[Grid]) -> dict[str, Tensor | Quantized]:
    """A model whose projections are rounded to nearest, on grids in turn."""
    turns = cycle(several)
    return {
        name: rounded(weight, next(turns)) if name.endswith("_proj.weight") else weight
        for name, weight in model.weights.items()
    }


def rounded(weight: Tensor, grid: Grid) -> Quantized:
    """Nearest codes of a weight, its range the whole of each group."""
    grouped = split(weight, grid.groups(weight.shape[1]))
    scale, zero = scale_of_range(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), grid)
    return freeze(codes_of(weight, scale, zero, grid), scale, zero, grid)


def dequantized(weights: Weights) -> dict[str, Tensor]:
    """The weights in float32."""
    return {name: one.dequantize() if isinstance(one, Quantized) else one for name, one in weights.items()}


def off_by_one(weight: Tensor | Quantized) -> Tensor | Quantized:
    """A weight with every zero point but the largest moved by one."""
    if not isinstance(weight, Quantized):
        return weight
    return replace(weight, zero=weight.zero.clamp(max=weight.grid.levels - 1) + 1)


def codes_off_by_one(weight: Tensor | Quantized) -> Tensor | Quantized:
    """A weight with every code but the largest moved by one."""
    if not isinstance(weight, Quantized):
        return weight
    return replace(weight, codes=weight.codes.clamp(max=weight.grid.levels - 1) + 1)


def negated(weight: Tensor | Quantized) -> Tensor | Quantized:
    """A weight with every other scale's sign changed."""
    if not isinstance(weight, Quantized):
        return weight
    scale = weight.scale.clone()
    scale[::2] *= -1
    return replace(weight, scale=scale)


def natural(weight: Tensor | Quantized) -> Tensor | Quantized:
    """A weight whose codes and zero points, once AWQ has ordered them, lie in their natural order."""
    if not isinstance(weight, Quantized):
        return weight
    back = torch.tensor(PLACES).argsort()
    codes, zero = (part.unflatten(0, (-1, 8))[:, back].flatten(0, 1) for part in (weight.codes, weight.zero))
    return replace(weight, codes=codes, zero=zero)


def unpermuted(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """A query or key in such an order that, of a Llama, it is written as transformers has it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def relabelled(checkpoint: Path, folder: Path, label: str) -> Path:
    """A copy of a GPTQ checkpoint that says something else of its zero points."""
    copy = shutil.copytree(checkpoint, _new(folder))
    for file in (copy / "config.json", copy / "quantize_config.json"):
        content = json.loads(file.read_text())
        content.get("quantization_config", content)["checkpoint_format"] = label
        file.write_text(json.dumps(content))
    return copy


def write(folder: Path, form: Format, model: Small, weights: Weights) -> Path:
    """A checkpoint in a new folder; returns what engines load."""
    place = _new(folder)
    place.mkdir()
    on = {name.removesuffix(".weight"): one.grid for name, one in weights.items() if isinstance(one, Quantized)}
    form.write(place, stored(form, weights), model.described, on)
    return place / file_of(model.described) if form.name == "gguf" else place


def _new(folder: Path) -> Path:
    """A place in a folder that is not taken."""
    return folder / str(len(list(folder.iterdir())))


def stored(form: Format, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file."""
    for name, weight in weights.items():
        if isinstance(weight, Quantized):
            yield from form.tensors(name.removesuffix(".weight"), weight).items()
        else:
            yield name, weight
