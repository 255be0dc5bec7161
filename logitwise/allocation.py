"""Bits where they matter: which bits each layer has, for a size of the whole.

What a model loses is taken to be the sum of what its layers lose alone. How far that carries, the comparison with bits
spread evenly over the same size tells, on held-out rows.
"""

from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

from logitwise.calibrate import RunRows
from logitwise.calibration.rows import Rows
from logitwise.errors import RecipeError
from logitwise.preflight import Job
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder, chain
from logitwise.sensitivity import Sensitivity, Together
from logitwise.skeleton import Slot
from logitwise.watch import Watcher

TOKENS = 2048
"""Tokens of the calibration rows that layers are measured on, in whole rows."""


def with_bits(
    job: Job, recipe: Recipe, data: RunRows, folder: RunFolder, root: str, watcher: Watcher
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with the bits of each layer, and what decided them; both from the run folder where it has them.

    Errors: RecipeError where they are no better on held-out rows than bits spread evenly over the same size.
    """
    if recipe.target_bits is None:
        return recipe, None
    asked = recipe.model_dump(include={"target_bits", "sensitivity", "group_size", "scale_dtype", "keep", "start"})
    texts = dict(rows=_few(data).digest(), held_out=data.held_out.digest())
    key = chain(root, symmetric=recipe.grid.symmetric, format=job.format.name, **asked, **texts)
    if not folder.has(key):
        with folder.ranks.first_alone() as mine:
            if mine:
                folder.save(key, {}, _measured(job, recipe, data, watcher))
    found = folder.record(key)
    counts = Counter(found["bits"].values())
    shares = ", ".join(f"{counts[bits]} layers at {bits} bits" for bits in sorted(counts))
    where = "bits spread evenly" if recipe.sensitivity == "even" else "bits where they matter"
    watcher.say(f"{where}: {shares}; {found['bits_per_weight']:.3f} bits a weight")
    if kl := found["held_out_kl"]:
        sentence = f"KL {kl['allocated']:.4f}, spread evenly {kl['evenly']:.4f} (held-out rows, before any fit)"
        if not kl["allocated"] < kl["evenly"]:
            raise RecipeError(
                f"--target-bits {recipe.target_bits:g} finds no better bits than those spread evenly",
                sentence,
                "choose another target, --set sensitivity=..., or --bits for all layers alike",
            )
        watcher.say(sentence)
    elif recipe.sensitivity != "even":
        watcher.say("no rows were held out: whether that is better than bits spread evenly was not asked")
    return recipe.but(layers={module: {"bits": bits} for module, bits in found["bits"].items()}), found


def _few(data: RunRows) -> Rows:
    return data.train[: -(-TOKENS // data.train.ids.shape[1])]


def _measured(job: Job, recipe: Recipe, data: RunRows, watcher: Watcher) -> dict[str, Any]:
    assert recipe.target_bits is not None
    skeleton = job.skeleton
    with watcher.stage("Measuring what bits are worth", len(skeleton) + 2) as stage:
        layers = Sensitivity(skeleton, recipe, job.kept, _few(data), job.format.bits_stored).of_layers(stage)
        weights = sum(slot.out_features * slot.in_features for slot in job.slots)
        size = int(recipe.target_bits * weights)
        bits = evenly = spread_evenly(layers, size)
        kl: dict[str, float] = {}
        if recipe.sensitivity != "even":
            bits = allocate(layers, size)
        if recipe.sensitivity != "even" and len(data.held_out):
            judge = Sensitivity(skeleton, recipe, job.kept, data.held_out)
            for name, one in (("allocated", bits), ("evenly", evenly)):
                kl[name] = judge.of_model(one)
                stage.advance()
    stored = sum(one.stored[bits[slot]] for one in layers for slot in one.slots[:1])
    return {
        "bits": {slot.module: count for slot, count in bits.items()},
        "bits_per_weight": stored / weights,
        "held_out_kl": kl,
        "evenly_bits_per_weight": sum(one.stored[evenly[one.slots[0]]] for one in layers) / weights,
        "losses": [{"layers": [slot.module for slot in one.slots], "loss": one.loss} for one in layers],
    }


def allocate(layers: Sequence[Together], size: int) -> dict[Slot, int]:
    """Bits of each layer, so that all take at most `size` bits and the sum of their losses is small.

    From the fewest bits on, the step of most loss saved per bit stored is taken, as long as one fits: the greedy way
    along the lower convex hulls, at most one step from the best (a knapsack of many small choices).
    """
    hulls = [_hull(one) for one in layers]
    place, left = [0] * len(layers), size - sum(one.stored[hull[0]] for one, hull in zip(layers, hulls, strict=True))

    def step(index: int) -> tuple[float, int, int] | None:
        if place[index] + 1 == len(hulls[index]):
            return None
        now, then = hulls[index][place[index] : place[index] + 2]
        cost = layers[index].stored[then] - layers[index].stored[now]
        return (layers[index].loss[then] - layers[index].loss[now]) / cost, index, cost

    waiting = [found for index in range(len(layers)) if (found := step(index))]
    heapify(waiting)
    while waiting:
        _, index, cost = heappop(waiting)
        if cost <= left:
            left -= cost
            place[index] += 1
            if found := step(index):
                heappush(waiting, found)
    return {slot: hull[at] for one, hull, at in zip(layers, hulls, place, strict=True) for slot in one.slots}


def _hull(one: Together) -> list[int]:
    """The bits on the lower convex hull of loss over size, from the fewest on, as long as more bits lose less."""
    hull: list[int] = []
    for bits in sorted(one.stored):
        if hull and not one.loss[bits] < one.loss[hull[-1]]:
            continue
        if hull and one.stored[hull[-1]] == one.stored[bits]:  # as large, as GGUF's types are, and loses less
            hull.pop()
        while len(hull) > 1 and _slope(one, hull[-2], bits) <= _slope(one, hull[-2], hull[-1]):
            hull.pop()
        hull.append(bits)
    return hull


def _slope(one: Together, few: int, many: int) -> float:
    return (one.loss[many] - one.loss[few]) / (one.stored[many] - one.stored[few])


def spread_evenly(layers: Sequence[Together], size: int) -> dict[Slot, int]:
    """Bits that know nothing of losses: two neighbouring numbers of bits, the larger evenly spread over the depth.

    As many have it as come nearest to `size` bits in all.
    """
    totals = {bits: sum(one.stored[bits] for one in layers) for bits in sorted(layers[0].stored)}
    few, many = next(((a, b) for a, b in pairwise(totals) if totals[b] > size), [*totals][-2:])
    share = (size - totals[few]) / (totals[many] - totals[few])
    bits, due, given = {}, 0.0, 0
    for one in layers:
        more = one.stored[many] - one.stored[few]
        due += share * more
        taken = given + more / 2 <= due
        given += more * taken
        bits.update(dict.fromkeys(one.slots, many if taken else few))
    return bits
