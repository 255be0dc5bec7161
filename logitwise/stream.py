"""Walks the windows: the activations that go from one block to the next, and the fits between.

The teacher sees full-precision blocks on full-precision inputs. The student sees the window being fitted on inputs that
came through the blocks already quantized. After the fits by mean squared error the final blocks are fitted again by the
objective, from the student's inputs of that place (the fork). Where these windows shrink, the first block of each is
fixed before the next is fitted.
"""

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import filterfalse, zip_longest

import torch
from torch import Tensor

from logitwise.activations import Streams
from logitwise.calibration.rows import Rows
from logitwise.descent import Schedule
from logitwise.fit import Data, Fitted, Window, fit, measure
from logitwise.fused import pays
from logitwise.grid import Quantized
from logitwise.head import Head
from logitwise.objectives import OBJECTIVES
from logitwise.objectives.mse import MeanSquaredError
from logitwise.quantizers import INFORMED, QUANTIZERS, STARTS, InformedStart, Quantizer, Start
from logitwise.ranks import ALONE, Ranks
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Call, Skeleton, Slot
from logitwise.stages import Part, fit_parts, parts_of
from logitwise.unfinished import halfway
from logitwise.watch import Stage, Watcher
from logitwise.windows import Step, made_by_mse


def compiles(skeleton: Skeleton, steps: list[Step]) -> bool:
    """Whether a run of these steps is faster with compiled weights, which is the same where it is resumed."""
    matrices = weights = 0  # how often one is learned from in all steps
    for step in steps:
        for block in step.blocks:
            for slot in skeleton.slots(block):
                matrices += step.steps
                weights += step.steps * slot.out_features * slot.in_features
    return skeleton.device.type == "cuda" and pays(matrices, weights)


class Walk:
    """Fits the windows that the run folder does not have yet.

    Args:
        skeleton: the model.
        recipe: how.
        rows: the rows to learn from, then those held out; `held_out` of the latter.
        folder: where finished windows are.
        kept: slots that stay in full precision.
        fresh: new rows without end for the final blocks; None where none are asked for.
        ranks: who has other rows.
        streams: where hidden states are; on the device by default.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        rows: Rows,
        held_out: int,
        folder: RunFolder,
        kept: Callable[[Slot], bool],
        fresh: Iterator[Rows] | None = None,
        ranks: Ranks = ALONE,
        streams: Streams | None = None,
    ) -> None:
        self.skeleton, self.recipe, self.rows, self.held_out = skeleton, recipe, rows, held_out
        self.folder, self.kept, self.fresh, self.ranks = folder, kept, fresh, ranks
        self.streams = streams or Streams.on(skeleton.device)
        self.at_once = skeleton.rows_at_once(recipe.batch, rows.ids.shape[1])

    def run(self, steps: list[Step], watcher: Watcher) -> None:
        """Fits every step that is not finished; afterwards the run folder has them all."""
        missing = [step for step in steps if not self.folder.has(step.key)]
        compiled = compiles(self.skeleton, steps)
        if not missing:
            watcher.say(f"all {len(steps)} fits were finished before")
            return
        if len(missing) < len(steps):
            watcher.say(f"{len(steps) - len(missing)} of {len(steps)} fits were finished before")
        depth = len(self.skeleton)
        fits, refits = ([step for step in steps if step.refit == refit] for refit in (False, True))
        fork = refits[0].blocks[0] if refits else depth
        with watcher.stage("Fitting blocks", sum(self._cost(step) for step in missing)) as stage:
            calls = self.skeleton.calls(self.rows.ids.shape[1])
            teacher = self.skeleton.embed(self.rows.ids, batch=self.at_once, streams=self.streams)
            student = at_fork = self.streams.copy(teacher)
            taught = 0  # blocks that the teacher's hidden states have come through
            head: Head | None = None
            for step, following in zip_longest(fits, fits[1:]):
                window = Window(self.skeleton, step.blocks, calls, self.kept, compiled)
                window.advance(teacher, {}, self.at_once, range(taught, step.blocks[-1] + 1))
                taught = step.blocks[-1] + 1
                if taught == depth:
                    head = self.skeleton.head()
                quantized = self._finish(step, window, student, teacher, head, stage, watcher)
                weights = {slot: q.dequantize() for slot, q in quantized.items()}
                behind = following.blocks[0] if following else max(fork, step.blocks[0]) if refits else step.blocks[0]
                for block in range(step.blocks[0], behind):
                    if block == fork:
                        at_fork = self.streams.copy(student)
                    window.advance(student, weights, self.at_once, range(block, block + 1))
                if behind <= fork:
                    at_fork = student
                del window, quantized, weights  # before the next are there
            student = at_fork  # those at the end are not read any more
            made = made_by_mse(steps)
            for step, following in zip_longest(refits, refits[1:]):
                window = Window(self.skeleton, step.blocks, calls, self.kept, compiled)
                fresh = self._fresh_data([made[block] for block in range(fork)], calls)
                quantized = self._finish(step, window, at_fork, teacher, head, stage, watcher, fresh)
                if following is not None:  # the window shrinks: its first block stays as it is now
                    weights = {slot: q.dequantize() for slot, q in quantized.items()}
                    window.advance(at_fork, weights, self.at_once, step.blocks[:1])

    def _finish(
        self,
        step: Step,
        window: Window,
        student: Tensor,
        teacher: Tensor,
        head: Head | None,
        stage: Stage,
        watcher: Watcher,
        fresh: Iterator[Data] | None = None,
    ) -> dict[Slot, Quantized]:
        """A step's result, from the run folder or fitted now."""
        recipe, device = self.recipe, self.skeleton.device
        stage.advance(0, f"{step.title} of {len(self.skeleton)}, {step.objective}")
        if self.folder.has(step.key):
            grids = {slot: recipe.grid_of(slot.module) for slot in window.slots}
            return {s: self.folder.load(step.key, grid, s.name).to(device) for s, grid in grids.items()}
        targets = teacher
        if step.refit and recipe.teacher_last == "quantized":
            targets = self.streams.copy(student)
            window.advance(targets, {}, self.at_once)
        following = self.rows.following.to(device)
        weights, train = self.rows.weights.to(device), self.ranks.count(step.train)
        data = Data(student, targets, weights, following, train, self.held_out, self.ranks)
        seed = int(hashlib.sha256(f"{recipe.seed} {step.blocks} {step.objective}".encode()).hexdigest()[:15], 16)
        how, choose = step.learning.__getitem__, recipe.choose_last if step.refit else "held_out"
        batch = self.ranks.count(step.batch)
        schedule = Schedule(step.steps, batch, recipe.checks, how, seed, choose, fresh is not None)
        quantizers = self._start(step, window, student)
        error = MeanSquaredError(recipe.left_out)
        objective = OBJECTIVES[step.objective](**recipe.objective_settings) if step.refit else error
        began = time.monotonic()
        parts, per_step, per_part = self._parts(step), self._cost_of_a_step(step), partial(self._cost_of_a_part, step)
        early = fit_parts(parts, window, quantizers, error, data, schedule, stage, per_part, self.streams)
        quantized = {slot: q for part in early for slot, q in part.quantized.items()}
        rest = window.fixing({slot: q.dequantize() for slot, q in quantized.items()})
        own = {slot: quantizers[slot] for slot in rest.slots}
        fitted = fit(rest, own, objective, head, data, schedule, stage, per_step, fresh, halfway(self.folder, step.key))
        quantized |= fitted.quantized
        seconds = time.monotonic() - began
        record = dict(
            blocks=[step.blocks[0], step.blocks[-1]],
            objective=step.objective,
            **vars(fitted.course),
            stages=[vars(part.course) for part in early],
            tokens=sum(part.tokens for part in [*early, fitted]),
            seconds=round(seconds, 3),
        )
        if head is not None and self.held_out:
            final = {slot: q.dequantize() for slot, q in quantized.items()}
            against = replace(data, targets=teacher)
            record["held_out_kl"] = measure(window, final, OBJECTIVES["lfq"](), head, against, recipe.batch)
        for part, of in zip(parts, early, strict=True):
            places = " and ".join(end or "its end" for end in part.ends)
            watcher.detail(_outcome(f"{step.title} at {places}", of, error.unit))
        watcher.detail(f"{_outcome(f'{step.title} by {step.objective}', fitted, objective.unit)}, {seconds:.0f} s")
        codes = {slot.name: q for slot, q in quantized.items()}
        self.folder.save(step.key, codes, record, self._state(step, quantizers))
        done = sum(len(of.course.losses) * per_part(part) for part, of in zip(parts, early, strict=True))
        stage.advance(self._cost(step) - done - len(fitted.course.losses) * per_step)
        # What a fit leaves behind holds itself in cycles; a window's parameters must not wait for Python to look.
        gc.collect()
        return quantized

    def _parts(self, step: Step) -> list[Part]:
        """What of a step's block is fitted before the rest."""
        return parts_of(self.recipe.block_stages, self.skeleton.slots(step.blocks[0]), self.kept)

    def _start(self, step: Step, window: Window, student: Tensor) -> dict[Slot, Quantizer]:
        """The quantizers before this step learns: at the recipe's start, or at what an earlier step learned."""
        method, start = QUANTIZERS[self.recipe.method], self.recipe.start
        sources = dict(zip(step.blocks, step.starts, strict=True))
        new = [slot for slot in window.slots if sources[slot.block] is None]
        others: dict[Slot, Start] = {}
        if new and start in INFORMED:
            moments = window.moments(student[: self.ranks.count(step.train)], self.at_once, self.ranks)
            others = {slot: _informed(INFORMED[start], moments[slot]) for slot in new}
        elif new:
            others = dict.fromkeys(new, STARTS[start])
        quantizers = window.quantizers(method, self.recipe.grid_of, STARTS["minmax"], others)
        for slot, quantizer in quantizers.items():
            if (key := sources[slot.block]) is not None:
                self.folder.load_state(key, slot.name, quantizer)
        return quantizers

    def _state(self, step: Step, quantizers: Mapping[Slot, Quantizer]) -> dict[str, dict[str, Tensor]]:
        """What a later step needs to go on from this one, by slot."""
        if not step.keeps_state:
            return {}
        # The weight is the model's own, and stays where it is, but for starts that round another.
        known = set() if self.recipe.start in INFORMED else {"weight"}
        found = {}
        for slot, quantizer in quantizers.items():
            left_out = known & {name for name, _ in quantizer.named_buffers()}
            found[slot.name] = {part: x for part, x in quantizer.state_dict().items() if part not in left_out}
        return found

    def _fresh_data(self, before: list[Step], calls: list[Call]) -> Iterator[Data] | None:
        """New rows as the final blocks meet them; `before` are the steps of the blocks before those."""
        if self.fresh is None:
            return None
        return (self._arriving(rows, before, calls) for rows in self.fresh)

    @torch.no_grad()
    def _arriving(self, rows: Rows, before: list[Step], calls: list[Call]) -> Data:
        """What rows become: the student's hidden states after the blocks of `before`, the teacher's after all."""
        recipe, device = self.recipe, self.skeleton.device
        teacher = self.skeleton.embed(rows.ids, batch=self.at_once)
        student = teacher.clone()
        for block, call in enumerate(calls):
            if block == len(before) and recipe.teacher_last == "quantized":
                teacher = student.clone()
            weights = self.skeleton.load_block(block)
            self.skeleton.advance(block, weights, teacher, call, self.at_once)
            if block < len(before):
                for slot in filterfalse(self.kept, self.skeleton.slots(block)):
                    codes = self.folder.load(before[block].key, recipe.grid_of(slot.module), slot.name).to(device)
                    weights[slot.key] = slot.put(codes.dequantize().to(self.skeleton.dtype))
                self.skeleton.advance(block, weights, student, call, self.at_once)
        return Data(student, teacher, rows.weights.to(device), rows.following.to(device), len(rows), 0, self.ranks)

    def _cost_of_a_step(self, step: Step) -> float:
        return step.batch * 3e-6 * self._parameters(step)

    def _cost_of_a_part(self, step: Step, part: Part) -> float:
        return step.batch * 3e-6 * part.weights

    def _parameters(self, step: Step) -> int:
        """Weights that a token of this step meets, the head included where it is read."""
        block = sum(p.numel() for p in self.skeleton.blocks[0].parameters()) * len(step.blocks)
        head: int = self.skeleton.model.get_output_embeddings().weight.numel() * OBJECTIVES[step.objective].reads_head
        return block + head

    def _cost(self, step: Step) -> float:
        """Rough multiply-adds of a step, for the time left: what is shown, not what is decided."""
        asked = (self.recipe.checks + 1) * self.held_out * 1e-6 * self._parameters(step)
        learned = self._cost_of_a_step(step) + sum(self._cost_of_a_part(step, part) for part in self._parts(step))
        return step.steps * learned + asked + 2e-6 * len(self.rows) * self._parameters(step)


def _informed(start: InformedStart, moments: Tensor) -> Start:
    return lambda weight, grid: start(weight, grid, moments)


def _outcome(title: str, fitted: Fitted, unit: str) -> str:
    """What a fit came to, in a line."""
    course = fitted.course
    if not course.held_out:
        return f"{title}: {len(course.losses)} steps"
    (_, before), after = course.held_out[0], dict(course.held_out).get(course.kept)
    end = "" if after is None else f" to {after:.4g}"  # the iterate of the least batch was not measured
    return f"{title}: held-out {unit} {before:.4g}{end}, step {course.kept} of {len(course.losses)} kept"
