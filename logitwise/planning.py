"""What a run will take, before it begins and without a weight being read: size, disk, memory, time, engines.

Sizes are counted. Times and memory are measured by probe.py on made-up weights, one unit of each kind, and multiplied
by how many units the run has.
"""

import gc
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from logitwise.activations import choose_place
from logitwise.audit import audit
from logitwise.calibration import ANSWER_BATCH, ANSWER_TOKENS
from logitwise.calibration import split as split_spec
from logitwise.errors import RecipeError
from logitwise.formats import unfusable
from logitwise.grid import Grid
from logitwise.machine import repeatable
from logitwise.memory import free_memory, only_new_collected, total_memory
from logitwise.preflight import Outline, outline
from logitwise.probe import TRIED_ON, OfWindow, bytes_of_streams, of_forward, of_text, of_window
from logitwise.quantizers import INFORMED, QUANTIZERS
from logitwise.recipe import Choice, Recipe
from logitwise.skeleton import PROOF_BLOCKS, Slot
from logitwise.unfinished import SECONDS
from logitwise.watch import SILENT, Watcher
from logitwise.windows import Step, plan_steps

GIB = 2**30
READING, WRITING = 2**29, 2**28
"""Bytes a second at which weights are taken to be read and hashed, and a checkpoint to be written, and to be read back:
the only figures that are not measured."""
STATE = 2 * 4 * 4
"""Bytes of disk for each number of a long fit: itself, its best iterate, two of Adam; as many while newer ones come."""
FIRST = "first steps, loading kernels"
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

    Errors: InputError for whatever the run itself would refuse before its work.
    """
    recipe = recipe or Recipe.load()
    outlined = outline(model, recipe, False, revision)
    grid_of = recipe.grid_of if recipe.target_bits is None else lambda module: recipe.grids_of(module)[0]
    machine = {name: outlined.choices[name].value for name in ("device", "compute_dtype")}
    grids = {slot.module: grid_of(slot.module) for slot in outlined.slots}
    size, stored, weights, parameters = _sizes(outlined, recipe, grids)
    with repeatable():
        seconds, device_memory, ram, on_disk, notes = _measured(outlined, recipe.but(**machine), size, watcher)
    fates = Counter(fate.fate for fate in audit(outlined.source, outlined.every, outlined.kept))
    run_folder = int(weights + stored / 8 - weights * recipe.grid.bits / 8) + on_disk
    place = Path(out or ".").absolute()
    return Plan(
        choices=outlined.choices,
        quantized=fates["quantized"],
        kept=fates["kept"],
        size=size,
        bits_per_weight=stored / weights,
        bits_per_parameter=8 * size / parameters,
        run_folder=run_folder,
        device_memory=device_memory,
        ram=ram,
        seconds=seconds,
        loaders=outlined.format.loaders(set(grids.values()), unfusable(grids, outlined.model.linear)),
        splits={count: _split(outlined, grids, count) for count in SPLITS},
        unmet=_unmet(recipe, machine["device"], size + run_folder, device_memory, ram, place),
        notes=notes,
    )


def _sizes(outlined: Outline, recipe: Recipe, grids: Mapping[str, Grid]) -> tuple[int, int, int, int]:
    """Bytes of the checkpoint, bits of its quantized weights, how many those are, and all parameters."""
    source, slots = outlined.source, outlined.slots
    weights = sum(slot.out_features * slot.in_features for slot in slots)
    if recipe.target_bits is None:
        each = (outlined.format.bits_stored(grids[s.module], s.out_features, s.in_features) for s in slots)
        stored = sum(each)
    else:
        stored = int(recipe.target_bits * weights)
    parameters = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    size = stored // 8 + (parameters - weights) * source.dtype.itemsize
    return size, stored, weights, parameters


def _measured(
    outlined: Outline, recipe: Recipe, size: int, watcher: Watcher
) -> tuple[dict[str, float], int | None, int, int, list[str]]:
    """Seconds of each part, bytes of GPU, of RAM and of disk beside finished windows at most, and what is left out."""
    source, device = outlined.source, torch.device(recipe.device)
    seconds = {"reading and checking the model": _bytes_checked(outlined) / READING, FIRST: 0.0}
    learns, depth = QUANTIZERS[recipe.method].learns, len(outlined.skeleton)
    rows, held = recipe.most_rows, recipe.held_out_rows
    all_rows, of_writing, counted, notes = rows + held, 0, 1.0, list[str]()
    if recipe.polish:  # whose rows may be more
        all_rows = max(all_rows, (recipe.polish_rows or 0) + held)
    if not learns:
        all_rows = all_rows if recipe.start in INFORMED or recipe.polish else 0
        recipe = recipe.but(objective="mse", steps=0, steps_last=0)
    steps = plan_steps(recipe, depth, "plan")
    fits, refits = ([step for step in steps if step.refit == refit] for refit in (False, True))
    largest = max(fits, key=lambda step: (len(step.blocks), step.batch))
    at_once = outlined.skeleton.rows_at_once(recipe.batch, recipe.row_tokens)
    with only_new_collected(), watcher.stage("Trying a few steps", 4) as stage:
        if all_rows and split_spec(recipe.calibration)[0] == "self":
            tokens = (all_rows + 2) * recipe.row_tokens
            answers = math.ceil(tokens / ANSWER_TOKENS)
            together = min(ANSWER_BATCH, answers)
            text = of_text(source, recipe, together, outlined.skeleton)
            seconds["writing calibration text"] = text.token * tokens + text.prompts * answers / together
            seconds[FIRST] += text.first
            of_writing, counted = text.peak, text.counted
        stage.advance()
        forward = of_forward(source, recipe, max(1, min(all_rows, at_once)))
        stage.advance()
        usual = of_window(source, recipe, largest, outlined.kept, min(all_rows, at_once))
        stage.advance()
        reading = min(all_rows, at_once), counted
        last = of_window(source, recipe, refits[0], outlined.kept, *reading) if refits else None
        stage.advance()
    gc.collect()
    seconds[FIRST] += usual.first + (last.first if last else 0.0)
    if last and device.type in TRIED_ON:
        seconds[FIRST] += last.opening + 2 * last.step
    if not seconds[FIRST]:
        del seconds[FIRST]

    def of_steps(some: list[Step], one: OfWindow, like: Step) -> float:
        total = 0.0
        for step in some:
            share = len(step.blocks) * step.batch / (len(like.blocks) * like.batch)
            asked = (recipe.checks + 1) * (held if step.steps else 0) * one.held_out_row
            total += one.opening * len(step.blocks) / len(like.blocks) + step.steps * one.step * share + asked
        return total

    fitting = of_steps(fits, usual, largest) + 2 * depth * all_rows * forward
    seconds["fitting blocks" if all_rows else "rounding blocks"] = fitting
    of_fits = usual.peak
    if last:
        seconds["fitting the final blocks by " + recipe.objective] = (
            of_steps(refits, last, refits[0]) + 2 * held * last.held_out_row
        )
        of_fits = max(of_fits, last.peak)
    if recipe.polish:
        batch = recipe.polish_batch or recipe.batch
        block = usual.step / (len(largest.blocks) * largest.batch)
        head = max(0.0, last.step / refits[0].batch - len(refits[0].blocks) * block) if last else 0.0
        seconds["polishing"] = recipe.polish_steps * batch * (depth * block + head) + depth * forward * (
            all_rows + 2 * held * (recipe.checks + 1)
        )
        notes.append("memory of the polish is that of its blocks one by one; it takes more where there is room")
    seconds["writing and reading back"] = 2 * size / WRITING
    notes += ["the time of --target-bits is not in it"] if recipe.target_bits is not None else []
    notes += ["the time of rewrites is not in it"] if recipe.rewrites else []
    notes += ["the stages of a block are taken for one fit: it takes longer"] if recipe.block_stages else []
    writes_on = recipe.fresh_last or (recipe.polish and recipe.polish_fresh)
    notes += ["the time of text that is written while blocks are learned is not in it"] if writes_on else []
    of_streams = bytes_of_streams(recipe, outlined.skeleton, all_rows)
    where = choose_place(recipe.streams, of_streams, device).value
    there = dict.fromkeys(("device", "cpu", "disk"), 0) | {where: of_streams}
    tried = [(largest, usual), *([(refits[0], last)] if last else [])]
    long = [one for step, one in tried if step.steps * one.step > SECONDS]
    on_disk = there["disk"] + STATE * max((one.learned for one in long), default=0)
    of_fits += of_writing if writes_on else 0  # the whole model is there beside them
    peak = max(of_writing, of_fits + there["device"])
    if device.type == "cuda":
        return seconds, peak, psutil.Process().memory_info().rss + there["cpu"], on_disk, notes
    return seconds, None, max(of_writing, of_fits + there["device"] + there["cpu"]), on_disk, notes


def _bytes_checked(outlined: Outline) -> int:
    """What checking a model reads: every weight once, and twice what the proof of its replay needs."""
    source, skeleton = outlined.source, outlined.skeleton
    sizes = {name: torch.Size(source.shape(name)).numel() * source.dtype.itemsize for name in source.names()}
    blocks = sum(size for name, size in sizes.items() if name.startswith(skeleton.blocks_name + "."))
    proved = blocks * min(PROOF_BLOCKS, len(skeleton)) // len(skeleton)
    return source.size_bytes + 2 * (sum(sizes.values()) - blocks + proved)


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


def _unmet(
    recipe: Recipe, device: str, disk: int, device_memory: int | None, ram: int, place: Path
) -> list[tuple[str, str]]:
    """Why the run does not fit on this machine, with what would help."""
    unmet = []
    there = next(parent for parent in [place, *place.parents] if parent.exists())
    room, total = psutil.disk_usage(str(there)).free, total_memory()
    less = "fewer --rows, shorter --row-tokens, or a smaller --batch"
    less += ", or fewer --final-blocks" if recipe.final_blocks != 1 else ""
    if disk > room:
        why = f"{disk / GIB:.1f} GiB of disk are needed at {there}, {room / GIB:.1f} are free"
        unmet.append((why, "choose another OUT"))
    if device_memory is not None and device_memory > (free := free_memory(torch.device(device))):
        unmet.append((f"{device_memory / GIB:.1f} GiB of the GPU are needed, {free / GIB:.1f} are free", less))
    if ram > total:
        unmet.append((f"{ram / GIB:.1f} GiB of RAM are needed, there are {total / GIB:.1f}", less))
    return unmet


def refuse_unmet(found: Plan) -> None:
    """Refuses a run that does not fit.

    Errors: RecipeError, naming what would help.
    """
    if found.unmet:
        raise RecipeError("the run does not fit on this machine", *found.unmet[0])
