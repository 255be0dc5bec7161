"""Walks the blocks in full precision and chooses every fold's scale; then proves that the model is the same."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.errors import MachineError, SourceError
from logitwise.grid import Grid, codes_of, freeze
from logitwise.quantizers.starts import STARTS, Start, searched
from logitwise.recipe import Recipe
from logitwise.rewrites.folds import Fold
from logitwise.rewrites.scales import READ_INPUTS, SCALES, Inputs, Problem, takes
from logitwise.skeleton import Call, Skeleton, Slot
from logitwise.source.base import Source
from logitwise.source.rewritten import Changes
from logitwise.watch import Stage

SAME = 1e-4
"""Of the largest logit: how far the rewritten model may be from the original in float32.

More than the replay proof allows, since here weights differ by their rounding to float32; a wrong fold is far beyond.
"""


@torch.no_grad()
def rewrite(
    skeleton: Skeleton,
    folds: Sequence[Fold],
    recipe: Recipe,
    ids: Int64[Tensor, "rows tokens"] | None,
    stage: Stage,
) -> tuple[Changes, list[dict[str, Any]]]:
    """Every fold's scale by the recipe's rewrites, one after another; the same model with other weights.

    Args:
        skeleton: the model as it came.
        folds: those that may be used.
        recipe: which rewrites, on which grid, from which start.
        ids: calibration rows; None where no rewrite reads text.
        stage: advances by one a block.

    Returns: what changes, and for each fold and rewrite what was chosen, for the report.

    Errors: MachineError where a layer reads what is no finite number; RecipeError where a scale does not fit its type.
    """
    changes, record = Changes(), list[dict[str, Any]]()
    start = STARTS.get(recipe.start, searched)
    tokens = 1 if ids is None else ids.shape[1]
    at_once, calls = skeleton.rows_at_once(recipe.batch, tokens), skeleton.calls(tokens)
    hidden = None if ids is None else skeleton.embed(ids, batch=at_once)
    for block in range(len(skeleton)):
        own = [fold for fold in folds if fold.block == block]
        weights = skeleton.load_block(block, dtype=torch.float32) if own or hidden is not None else {}
        inputs: dict[Fold, Inputs] = {}
        if hidden is not None:
            inputs = _inputs(skeleton, block, weights, hidden, calls[block], own, at_once)
        for fold in own:
            rounded = partial(
                _rounded, parts=[(r.out_features, recipe.grid_of(r.module)) for r in fold.readers], start=start
            )
            storable = partial(fold.storable, weights=weights, dtype=skeleton.source.dtype)
            scale = torch.ones(fold.size, device=skeleton.device)
            for name in recipe.rewrites:
                if not takes(name, fold):
                    continue
                problem = Problem(
                    fold.read_weight(weights) * scale,
                    rounded,
                    _relative(storable, scale),
                    inputs.get(fold) if name in READ_INPUTS else None,
                )
                chosen = SCALES[name](problem)
                scale = scale * chosen.scale
                record.append(
                    {
                        "block": block,
                        "rewrite": name,
                        "from": fold.producer,
                        "into": [reader.key.removesuffix(".weight") for reader in fold.readers],
                        **chosen.by,
                        "error_before": chosen.before,
                        "error_after": chosen.after,
                    }
                )
            _note(changes, skeleton, fold, weights, scale)
        stage.advance()
    return changes, record


def _rounded(weight: Tensor, parts: Sequence[tuple[int, Grid]], start: Start) -> Tensor:
    """Weights, one below another, so many rows on each grid, rounded to nearest where their fits would start."""
    found = []
    for rows, (_, grid) in zip(weight.split([rows for rows, _ in parts]), parts, strict=True):
        at = start(rows.contiguous(), grid)
        found.append(freeze(codes_of(at.weight, at.scale, at.zero, grid), at.scale, at.zero, grid).dequantize())
    return torch.cat(found)


def _relative(storable: Callable[[Tensor], Tensor], scale: Tensor) -> Callable[[Tensor], Tensor]:
    """What can be stored on top of a scale that was chosen before."""
    return lambda more: storable(scale * more) / scale


def _inputs(
    skeleton: Skeleton,
    block: int,
    weights: dict[str, Tensor],
    hidden: Float[Tensor, "rows tokens d"],
    call: Call,
    folds: list[Fold],
    at_once: int,
) -> dict[Fold, Inputs]:
    """What the readers of each fold read; `hidden` in place becomes the block's output."""
    computed = {key: weight.to(skeleton.dtype) for key, weight in weights.items()}
    tokens = hidden.shape[0] * hidden.shape[1]
    found = {
        fold: Inputs(*(torch.zeros(shape, device=skeleton.device) for shape in ((fold.size, fold.size), (fold.size,))))
        for fold in folds
    }
    for part in hidden.split(at_once):
        output, seen = skeleton.run_seen(block, computed, part, call)
        for fold, inputs in found.items():
            x = seen[fold.readers[0].key].flatten(0, -2).float()
            inputs.moments.addmm_(x.T, x, alpha=1 / tokens)
            inputs.size.add_(x.abs().sum(0), alpha=1 / tokens)
        part.copy_(output)
    for fold, inputs in found.items():
        if not bool(torch.isfinite(inputs.moments).all()):
            raise MachineError(
                f"{fold.readers[0].name} reads what is not a finite number",
                f"the blocks before it overflowed in {str(skeleton.dtype).removeprefix('torch.')}",
                "choose --set compute_dtype=float32, or leave awq out of rewrites",
            )
    return found


def _note(changes: Changes, skeleton: Skeleton, fold: Fold, weights: dict[str, Tensor], scale: Tensor) -> None:
    """Adds one fold's part to the changes."""
    if bool((scale == 1).all()):
        return
    names = {key: f"{skeleton.blocks_name}.{fold.block}.{key}" for key in fold.vectors}
    now = {key: changes.vectors.get(name, weights[key]).to(scale.device) for key, name in names.items()}
    for key, vector in fold.divided_vectors(now, scale).items():
        changes.vectors[names[key]] = vector.to(skeleton.source.dtype).cpu()
    for reader in fold.readers:
        _multiply(changes, reader, scale, rows=False)
    if fold.rows is not None:
        _multiply(changes, fold.rows, 1 / fold.spread(scale, fold.rows.out_features), rows=True)


def _multiply(changes: Changes, slot: Slot, scale: Tensor, rows: bool) -> None:
    """Adds a factor along a slot's rows [out] or columns [in], whichever axis of its parameter these are."""
    axis = changes.first if rows != slot.transposed else changes.second
    scale = scale.cpu()
    axis[slot.name] = axis[slot.name] * scale if slot.name in axis else scale.clone()


def prove_same(original: Source, rewritten: Source, device: torch.device) -> float:
    """The largest difference between the logits of two models on random tokens in float32; the second replays too.

    As in the replay proof, of a deep model eight blocks stand for all.

    Errors: SourceError where it exceeds 1e-4 of the largest logit, or the second is not its own replay.
    """
    skeleton = Skeleton(rewritten, device, torch.float32)
    skeleton.prove()
    one, _ = Skeleton(original, device, torch.float32).proof_logits()
    other, _ = skeleton.proof_logits()
    difference = float((one - other).abs().max())
    if not difference <= SAME * max(1.0, float(one.abs().max())):
        raise SourceError(
            f"{original.name} is not the same model after its rewrites",
            f"logits differ by up to {difference:.3g} on random tokens",
            "leave rewrites out; please report the model with its config.json",
        )
    return difference
