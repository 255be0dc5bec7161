"""What a run will take, before it begins and without its weights being loaded: size, disk, memory, time, engines.

Sizes are counted; times and memory are costs.py's to say.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from logitwise.audit import audit
from logitwise.costs import (
    FITS,
    READING,
    TEXT,
    Memory,
    Work,
    memory_of,
    seconds_of,
    units_of,
    work_of,
)
from logitwise.errors import RecipeError
from logitwise.formats import unfusable
from logitwise.grid import Grid
from logitwise.machine import repeatable
from logitwise.memory import free_memory, total_memory
from logitwise.preflight import Outline, outline
from logitwise.probe import of_opening
from logitwise.recipe import Choice, Recipe
from logitwise.remedies import more_memory, other_text, smaller_fit
from logitwise.skeleton import Slot
from logitwise.watch import SILENT, Watcher

GIB = 2**30
SPLITS = (1, 2, 4, 8)
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "wo", "w2")
"""Names of layers whose inputs tensor parallelism splits; of all others it splits the outputs."""


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        choices: what was chosen automatically, with reasons.
        quantized, kept: how many tensors will be quantized, and how many stay as they are.
        size: of the checkpoint's weights, in bytes.
        bits_per_weight: of a quantized weight, scales and zero points included.
        bits_per_parameter: of all.
        run_folder: bytes beside OUT until the run ends.
        device_memory: bytes of the GPU at most; None on a CPU.
        ram: bytes of RAM at most, those of Python and its libraries included.
        seconds: of each part of the run.
        loaders: what loads the checkpoint.
        splits: by number of GPUs that share each layer, None where they can, or else why not.
        unmet: why the run does not fit on this machine, each reason with what would help.
        notes: what the figures leave out.
    """

    choices: dict[str, Choice]
    quantized: int
    kept: int
    size: int
    bits_per_weight: float
    bits_per_parameter: float
    run_folder: int
    device_memory: int | None
    ram: int
    seconds: dict[str, float]
    loaders: str
    splits: dict[int, str | None]
    unmet: list[tuple[str, str]]
    notes: list[str]


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    revision: str | None = None,
    watcher: Watcher = SILENT,
) -> Plan:
    """What quantizing a model by a recipe will take.

    Args:
        model: a folder of safetensors, a .gguf file or a hub id.
        recipe: what to do; the standard preset by default.
        out: where the checkpoint is to go, for the room that is left there; the working folder by default.
        revision: of a hub id.
        watcher: hears how far it is.

    Errors: InputError for whatever the run itself would refuse before its work, and where a few steps do not fit.
    """
    recipe = recipe or Recipe.load()
    outlined = outline(model, recipe, False, revision)
    grid_of = recipe.grid_of if recipe.target_bits is None else lambda module: recipe.grids_of(module)[0]
    machine = {name: outlined.choices[name].value for name in ("device", "compute_dtype")}
    grids = {slot.module: grid_of(slot.module) for slot in outlined.slots}
    work = work_of(outlined, recipe.but(**machine))
    size, stored = _sizes(outlined, recipe, grids, work)
    with repeatable():
        units = units_of(outlined, work, grids, watcher)
    seconds = seconds_of(work, units, size)
    seconds[READING] += of_opening(model, revision)
    memory = memory_of(outlined, work, units, size)
    fates = Counter(fate.fate for fate in audit(outlined.source, outlined.every, outlined.kept))
    run_folder = int(work.weights + stored / 8 - work.weights * recipe.grid.bits / 8) + memory.disk
    place = Path(out or ".").absolute()
    return Plan(
        choices=outlined.choices,
        quantized=fates["quantized"],
        kept=fates["kept"],
        size=size,
        bits_per_weight=stored / work.weights,
        bits_per_parameter=8 * size / work.parameters,
        run_folder=run_folder,
        device_memory=None if memory.device is None else max(memory.device.values()),
        ram=max(memory.ram.values()),
        seconds=seconds,
        loaders=outlined.format.loaders(set(grids.values()), unfusable(grids, outlined.model.linear)),
        splits={count: _split(outlined, grids, count) for count in SPLITS},
        unmet=_unmet(recipe, machine["device"], size + run_folder, memory, place),
        notes=_notes(recipe),
    )


def _sizes(outlined: Outline, recipe: Recipe, grids: Mapping[str, Grid], work: Work) -> tuple[int, int]:
    """Bytes of the checkpoint, and bits of its quantized weights."""
    if recipe.target_bits is None:
        slots = outlined.slots
        stored = sum(outlined.format.bits_stored(grids[s.module], s.out_features, s.in_features) for s in slots)
    else:
        stored = int(recipe.target_bits * work.weights)
    return stored // 8 + (work.parameters - work.weights) * outlined.source.dtype.itemsize, stored


def _notes(recipe: Recipe) -> list[str]:
    """What the figures leave out."""
    said = {
        "memory of the polish is that of its blocks one by one; it takes more where there is room": recipe.polish,
        "the time of --target-bits is not in it": recipe.target_bits is not None,
        "the time of rewrites is not in it": bool(recipe.rewrites),
        "the stages of a block are taken for one fit: it takes longer": bool(recipe.block_stages),
        "the time of text that is written while blocks are learned is not in it": recipe.writes_on,
    }
    return [note for note, holds in said.items() if holds]


def _split(outlined: Outline, grids: Mapping[str, Grid], count: int) -> str | None:
    """None where so many GPUs can share every layer, as vLLM shares them, else why not."""
    if reason := unfusable(grids, outlined.model.linear):
        return reason
    config = outlined.skeleton.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", count)
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % count or (of_keys % count and count % of_keys):
        return f"{heads} attention heads with {of_keys} for keys cannot be shared by {count}"
    for slot in outlined.slots:
        if reason := _split_layer(slot, grids[slot.module], count):
            return reason
    return None


def _split_layer(slot: Slot, grid: Grid, count: int) -> str | None:
    if slot.module.rpartition(".")[2] not in ROW_PARALLEL:
        whole = slot.out_features % count == 0
        return None if whole else f"{slot.module} has {slot.out_features} outputs, which {count} cannot share"
    inputs = slot.in_features / count
    if inputs == int(inputs) and (grid.group_size is None or inputs % grid.group_size == 0):
        return None
    return f"{slot.module} would have {inputs:g} inputs on each of {count}, no whole groups of {grid.group_size}"


def _unmet(recipe: Recipe, device: str, disk: int, memory: Memory, place: Path) -> list[tuple[str, str]]:
    """Why the run does not fit on this machine, with what would help."""
    unmet = []
    there = next(parent for parent in [place, *place.parents] if parent.exists())
    if disk > (room := psutil.disk_usage(str(there)).free):
        why = f"{disk / GIB:.1f} GiB of disk are needed at {there}, {room / GIB:.1f} are free"
        unmet.append((why, "choose another OUT"))
    places = [("RAM", memory.ram, total_memory(), "there are {:.1f}")]
    if memory.device is not None:
        places.insert(0, ("the GPU", memory.device, free_memory(torch.device(device)), "{:.1f} are free"))
    helps = {TEXT: other_text(recipe), FITS: smaller_fit(recipe)}
    for where, parts, room, found in places:
        if over := {part: needed for part, needed in parts.items() if needed > room}:
            most = max(over, key=over.__getitem__)
            why = f"{over[most] / GIB:.1f} GiB of {where} are needed for {most}, {found.format(room / GIB)}"
            more = more_memory(parts is memory.device)
            unmet.append((why, "; and ".join(dict.fromkeys(helps.get(part, more) for part in over))))
    return unmet


def refuse_unmet(found: Plan) -> None:
    """Refuses a run that does not fit.

    Errors: RecipeError, naming what would help.
    """
    if found.unmet:
        raise RecipeError("the run does not fit on this machine", *found.unmet[0])
