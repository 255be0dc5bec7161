"""The rewrites of a run: made once, proved, and kept in the run folder."""

from dataclasses import replace
from typing import Any

from logitwise.calibrate import RunRows
from logitwise.calibration.rows import Rows
from logitwise.preflight import Job
from logitwise.recipe import Recipe
from logitwise.rewrites import READ_INPUTS, prove_same, rewrite
from logitwise.runfolder import RunFolder, chain
from logitwise.skeleton import Skeleton
from logitwise.source.rewritten import Rewritten
from logitwise.watch import Watcher


def rewritten_job(
    job: Job, recipe: Recipe, data: RunRows | None, folder: RunFolder, root: str, watcher: Watcher
) -> tuple[Job, str, dict[str, Any] | None]:
    """The job on the rewritten model, the key of what follows, and what was done; as they came without rewrites."""
    if not recipe.rewrites:
        return job, root, None
    rows = data.train[: recipe.rows] if data and set(recipe.rewrites) & set(READ_INPUTS) else None
    asked = recipe.model_dump(include={"rewrites", "start", "keep", "batch", "layers"})
    key = chain(
        root,
        grid=vars(recipe.grid),
        rows=None if rows is None else rows.digest(),
        **asked,
    )
    if folder.has(key):
        watcher.say("the model was rewritten before")
    else:
        with folder.ranks.first_alone() as mine:
            if mine:
                _rewrite(job, recipe, rows, key, folder, watcher)
    record = folder.record(key)
    _say_rewritten(watcher, recipe, record)
    changes = folder.load_changes(key)
    skeleton = Skeleton(Rewritten(job.source, changes), job.skeleton.device, job.skeleton.dtype)
    fates = [replace(f, why=f"{f.why}; rewritten") if f.tensor in changes.vectors else f for f in job.fates]
    return replace(job, skeleton=skeleton, fates=fates), key, record


def _rewrite(job: Job, recipe: Recipe, rows: Rows | None, key: str, folder: RunFolder, watcher: Watcher) -> None:
    with watcher.stage("Rewriting blocks", len(job.skeleton)) as stage:
        changes, folds = rewrite(job.skeleton, job.folds, recipe, None if rows is None else rows.ids, stage)
    difference = prove_same(job.source, Rewritten(job.source, changes), job.skeleton.device)
    left_alone = [f"block {fold.block}: {fold.producer}" for fold in job.left_alone]
    folder.save_changes(key, changes, {"logit_difference": difference, "folds": folds, "left_alone": left_alone})


def _say_rewritten(watcher: Watcher, recipe: Recipe, record: dict[str, Any]) -> None:
    for name in recipe.rewrites:
        own = [fold for fold in record["folds"] if fold["rewrite"] == name]
        before, after = (sum(fold[f"error_{when}"] for fold in own) / len(own) for when in ("before", "after"))
        blocks = len({fold["block"] for fold in own})
        watcher.say(f"{name}: {len(own)} folds in {blocks} blocks, mean relative error {before:.3g} to {after:.3g}")
    if left := record["left_alone"]:
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        watcher.say(f"not rewritten, since --keep has a matrix that would change: {names}")
