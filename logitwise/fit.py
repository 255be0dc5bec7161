"""Fits one window: one block or K blocks, by any method and any objective. Knows none of them by name."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from itertools import chain, islice

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from logitwise.carrying import brought, bus_between, sent, through
from logitwise.descent import Course, Halfway, Schedule, descend, row_order
from logitwise.errors import MachineError
from logitwise.fused import compiled_weight
from logitwise.grid import Grid, Quantized
from logitwise.head import Head
from logitwise.learnable import LearnableBlock, LearnableBlocks
from logitwise.objectives import Objective, Taps
from logitwise.quantizers import Quantizer, Start
from logitwise.ranks import ALONE, Ranks
from logitwise.sharing import Alone, Shared
from logitwise.skeleton import Call, Skeleton, Slot
from logitwise.watch import Stage


class Window:
    """Consecutive blocks with their full-precision weights.

    Args:
        skeleton: whose blocks they are.
        blocks: which.
        calls: how each block of the model is called.
        kept: slots that stay in full precision.
        compiled: whether weights that do not depend on how far the fit is are compiled while it goes on.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        blocks: range,
        calls: list[Call],
        kept: Callable[[Slot], bool],
        compiled: bool = False,
    ) -> None:
        self.skeleton, self.blocks, self.calls, self.compiled = skeleton, blocks, calls, compiled
        self.weights = {block: skeleton.load_block(block, dtype=torch.float32) for block in blocks}
        self.slots = [slot for block in blocks for slot in skeleton.slots(block) if not kept(slot)]

    def fixing(self, weights: Mapping[Slot, Tensor]) -> "Window":
        """The same window with these float32 weights [out, in] in place of its own, which are quantized no more."""
        fixed = copy(self)
        fixed.weights = {block: dict(own) for block, own in self.weights.items()}
        for slot, weight in weights.items():
            fixed.weights[slot.block][slot.key] = slot.put(weight)
        fixed.slots = [slot for slot in self.slots if slot not in weights]
        return fixed

    def quantizers(
        self,
        method: type[Quantizer],
        grid_of: Callable[[str], Grid],
        start: Start,
        others: Mapping[Slot, Start] | None = None,
    ) -> dict[Slot, Quantizer]:
        """A quantizer for each slot, on the grid of its module, at its start, which may be another for some slots."""
        starts = others or {}
        made = {}
        for slot in self.slots:
            weight = slot.get(self.weights[slot.block]).contiguous()
            made[slot] = method.start(weight, grid_of(slot.module), starts.get(slot, start))
        return made

    @torch.no_grad()
    def moments(
        self, hidden: Float[Tensor, "rows tokens d"], batch: int, ranks: Ranks = ALONE
    ) -> dict[Slot, Float[Tensor, "inputs inputs"]]:
        """The mean of x x^T over what each slot reads where `hidden`, of all ranks, enters the window, in float32.

        Slots that read the same have one tensor together.

        Errors: MachineError, naming the layer, where it reads what is no finite number.
        """
        found: dict[Slot, Tensor] = {}
        (tokens,) = ranks.total(hidden.shape[0] * hidden.shape[1])
        for start in range(0, hidden.shape[0], batch):
            entering = hidden[start : start + batch].to(self.skeleton.device)
            for block in self.blocks:
                weights = {key: weight.to(self.skeleton.dtype) for key, weight in self.weights[block].items()}
                leaving, seen = self.skeleton.run_seen(block, weights, entering, self.calls[block])
                of_input: dict[int, Tensor] = {}
                for slot in self.slots:
                    if slot.block == block:
                        read = seen[slot.key]
                        if id(read) not in of_input:
                            x = read.flatten(0, -2).float()
                            added = (x.T @ x).div_(tokens)
                            of_input[id(read)] = found[slot].add_(added) if slot in found else added
                        found[slot] = of_input[id(read)]
                entering = leaving
        ranks.add({id(total): total for total in found.values()}.values())
        for slot, total in found.items():
            if not bool(torch.isfinite(total).all()):
                raise MachineError(
                    f"{slot.name} reads what is not a finite number",
                    f"the blocks before it overflowed in {str(self.skeleton.dtype).removeprefix('torch.')}",
                    "choose --set compute_dtype=float32, or --start searched",
                )
        return found

    def forward(
        self, hidden: Float[Tensor, "rows tokens d"], replaced: Mapping[Slot, Tensor], blocks: range | None = None
    ) -> Float[Tensor, "rows tokens leaving"]:
        """The output of the window, or of these of its blocks, with the weights [out, in] of some replaced."""
        for block in self.blocks if blocks is None else blocks:
            hidden = self._run(block, hidden, replaced)
        return hidden

    def _run(self, block: int, hidden: Tensor, replaced: Mapping[Slot, Tensor]) -> Tensor:
        dtype = self.skeleton.dtype
        weights = {key: weight.to(dtype) for key, weight in self.weights[block].items()}
        for slot, weight in replaced.items():
            if slot.block == block:
                weights[slot.key] = slot.put(weight.to(dtype))
        return self.run_block(block, weights, hidden)

    def run_block(self, block: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """One block's output with all its parameters in the computing type."""
        return self.skeleton.run(block, weights, hidden, self.calls[block])

    def weights_of(self, quantizers: Mapping[Slot, Quantizer], progress: float) -> dict[Slot, Tensor]:
        """What quantizers stand for at a point of the fit, in float32.

        Compiled, where it is to be and that point is nothing: then in the type that blocks are computed in, so that no
        weight is written in float32.
        """
        if not (self.compiled and _constant(quantizers)):
            return weights_of(quantizers, progress)
        return {slot: compiled_weight(quantizer, self.skeleton.dtype) for slot, quantizer in quantizers.items()}

    def learn(self, quantizers: Mapping[Slot, Quantizer]) -> Callable[[Tensor, float], Tensor]:
        """The window with the quantizers' weights, to go backward through: (hidden states, progress) -> its output."""
        now = 0.0

        def block_of(block: int) -> LearnableBlock:
            own = {slot: quantizer for slot, quantizer in quantizers.items() if slot.block == block}
            return LearnableBlock(
                lambda hidden: self._run(block, hidden, self.weights_of(own, now)), list(own.values())
            )

        blocks = self._learnable(block_of, quantizers, _constant(quantizers))

        def forward(hidden: Tensor, progress: float) -> Tensor:
            nonlocal now
            now = progress
            return blocks(hidden)

        return forward

    def through(self, weights: Mapping[Slot, nn.Parameter]) -> Callable[[Tensor], Tensor]:
        """The window with these weights in its slots, to go backward through to them."""

        def block_of(block: int) -> LearnableBlock:
            own = {slot: weight for slot, weight in weights.items() if slot.block == block}
            return LearnableBlock(lambda hidden: self._run(block, hidden, own), list(own.values()))

        return self._learnable(block_of, weights, True)

    def _learnable(
        self, block_of: Callable[[int], LearnableBlock], slots: Iterable[Slot], may_record: bool
    ) -> LearnableBlocks:
        weights = sum(slot.out_features * slot.in_features for slot in slots)
        return LearnableBlocks([block_of(block) for block in self.blocks], weights, may_record)

    @torch.no_grad()
    def advance(
        self,
        hidden: Float[Tensor, "rows tokens d"],
        replaced: Mapping[Slot, Tensor],
        batch: int,
        blocks: range | None = None,
    ) -> None:
        """`hidden` in place becomes the window's output, or that of these of its blocks."""
        through(hidden, lambda part: self.forward(part, replaced, blocks), batch, self.skeleton.device)


@dataclass(frozen=True)
class Data:
    """What a window is fitted on: the student's inputs, the teacher's outputs, and which rows choose.

    Where ranks share the rows, those of this one.

    Args:
        inputs: what the student's window reads, [rows, tokens, d], where streams are.
        targets: what the teacher's window puts out, [rows, tokens, d], likewise.
        weights: how much each position counts, [rows, tokens].
        following: the token after each position, [rows, tokens].
        train: the first rows, which are learned from.
        held_out: the last rows, which choose the iterate.
        ranks: who has the other rows.
        teacher_head: the teacher's, where it is another than the student's.
    """

    inputs: Float[Tensor, "rows tokens d"]
    targets: Float[Tensor, "rows tokens leaving"]
    weights: Float[Tensor, "rows tokens"]
    following: Int64[Tensor, "rows tokens"]
    train: int
    held_out: int
    ranks: Ranks = ALONE
    teacher_head: Head | None = None

    def entering(self, rows: slice) -> Float[Tensor, "rows tokens d"]:
        """What the student's window reads of some rows, on the device."""
        return self.inputs[rows].to(self.weights.device)

    def leaving(self, rows: slice) -> Float[Tensor, "rows tokens leaving"]:
        """What the teacher's window puts out for some rows, on the device."""
        return self.targets[rows].to(self.weights.device)

    def some(self, rows: slice) -> "Data":
        """Some rows alone, on the device."""
        weights, following = self.weights[rows], self.following[rows]
        there = self.entering(rows), self.leaving(rows)
        return Data(*there, weights, following, len(weights), 0, self.ranks, self.teacher_head)

    def taps(self, rows: slice, student: Float[Tensor, "rows tokens d"], head: Head | None) -> Taps:
        """What an objective sees of some rows."""
        weights, following = self.weights[rows], self.following[rows]
        return Taps(student, self.leaving(rows), weights, following, head, head and self.teacher_head)


def batches_of(
    data: Data, schedule: Schedule, fresh: Iterator[Data] | None, tokens: Int64[Tensor, ""], done: int = 0
) -> Generator[Data, None, None]:
    """For each step after those `done` its rows, on the device: those there are again and again, or once, then fresh.

    `tokens` grows by the counted positions of each that is taken or passed over. Nothing is under way once the
    generator is closed.
    """
    size = schedule.batch
    if fresh is None:
        order = row_order(data.train, size, schedule.seed + data.ranks.rank)
        for rows in islice(order, done):  # nothing of them is brought to the device
            tokens.add_((data.weights[sent(rows, tokens.device)] > 0).sum())
        taken = _brought(data, order)
    else:
        starts = ((part, start) for part in chain([data], fresh) for start in range(0, part.train - size + 1, size))
        taken = (part.some(slice(start, start + size)) for part, start in starts)
        for part in islice(taken, done):
            tokens.add_((part.weights > 0).sum())
    with closing(taken):
        for part in taken:
            tokens.add_((part.weights > 0).sum())
            yield part


def _brought(data: Data, order: Iterator[Tensor]) -> Generator[Data, None, None]:
    device = data.weights.device
    bus = bus_between(data.inputs.device, device)
    of_rows = (sent(rows, data.inputs.device) for rows in order)
    with closing(brought(of_rows, (data.inputs, data.targets), bus)) as arriving:
        for rows, (inputs, targets) in arriving:
            own = sent(rows, device)
            weights, following = data.weights[own], data.following[own]
            there = inputs.to(device), targets.to(device), weights, following
            yield Data(*there, len(weights), 0, data.ranks, data.teacher_head)


@dataclass(frozen=True)
class Fitted:
    """The outcome of a fit.

    Args:
        quantized: what is stored, by slot.
        course: how it went.
        tokens: how many counted positions were learned from, the same one twice where rows came again.
    """

    quantized: dict[Slot, Quantized]
    course: Course
    tokens: int


def fit(
    window: Window,
    quantizers: dict[Slot, Quantizer],
    objective: Objective,
    head: Head | None,
    data: Data,
    schedule: Schedule,
    stage: Stage,
    units: float = 1,
    fresh: Iterator[Data] | None = None,
    halfway: Halfway | None = None,
) -> Fitted:
    """Learns the quantizers of a window and keeps the iterate that the schedule chooses.

    `stage` advances by `units` a step. With `fresh` data, which come after those there are, no row is learned from
    twice. `halfway` keeps how far it is.

    Errors: MachineError, naming the layer, where a parameter stops being a number.
    """
    if not quantizers:  # every slot of the window is kept in full precision
        return Fitted({}, Course([], [], 0, None), 0)
    learner = _learner(window, quantizers, data.ranks)
    own = learner.own
    tokens = torch.zeros((), dtype=torch.int64, device=data.weights.device)
    parameters = [(role, p) for q in own.values() for role, group in q.groups().items() for p in group]

    def learn(step: int, part: Data) -> Tensor:
        student = learner.forward(part.inputs, step / schedule.steps)
        return learner.backward(objective.shared(part.taps(slice(None), student, head), data.ranks))

    @torch.no_grad()
    def measure_held_out() -> float:
        return measure(window, learner.weights(), objective, head, data, schedule.batch)

    def after_step() -> None:
        for quantizer in own.values():
            quantizer.after_step()

    course = descend(
        parameters,
        lambda done: batches_of(data, schedule, fresh, tokens, done),
        learn,
        measure_held_out if data.held_out else None,
        lambda: _refuse(learner.first_of_all(_no_number(own))),
        schedule,
        stage,
        units,
        after_step,
        learner.halfway(halfway),
    )
    learner.finish()
    return Fitted(
        {slot: quantizer.freeze() for slot, quantizer in quantizers.items()},
        course,
        int(*data.ranks.total(int(tokens))),
    )


def _learner(window: Window, quantizers: dict[Slot, Quantizer], ranks: Ranks) -> Alone:
    if ranks.world == 1 or not any(quantizer.groups() for quantizer in quantizers.values()):  # nothing is learned
        return Alone(quantizers, window.learn(quantizers), weights_of)
    skeleton = window.skeleton
    return Shared(quantizers, ranks, window.through, window.weights_of, skeleton.dtype, skeleton.device)


def weights_of(quantizers: Mapping[Slot, Quantizer], progress: float) -> dict[Slot, Tensor]:
    """The weights that the quantizers stand for at a point of the fit."""
    return {slot: quantizer(progress) for slot, quantizer in quantizers.items()}


def _constant(quantizers: Mapping[Slot, Quantizer]) -> bool:
    """Whether what they stand for does not depend on how far the fit is."""
    return not any(quantizer.reads_progress for quantizer in quantizers.values())


@torch.no_grad()
def measure(
    window: Window,
    weights: Mapping[Slot, Tensor],
    objective: Objective,
    head: Head | None,
    data: Data,
    batch: int,
) -> float:
    """The objective's mean measure over the held-out rows."""
    total = count = 0.0
    first = data.inputs.shape[0] - data.held_out
    for start in range(first, data.inputs.shape[0], batch):
        part = slice(start, start + batch)
        student = window.forward(data.entering(part), weights)
        added, counted = objective.measure(data.taps(part, student, head))
        total, count = total + added, count + counted
    total, count = data.ranks.total(total, count)
    return total / count


def _no_number(quantizers: Mapping[Slot, Quantizer]) -> str | None:
    """The first slot of which a learned parameter is no finite number."""
    for slot, quantizer in quantizers.items():
        if not all(bool(torch.isfinite(parameter).all()) for parameter in quantizer.parameters()):
            return slot.name
    return None


def _refuse(name: str | None) -> None:
    """Errors: MachineError, naming the layer whose parameters are no longer numbers, where there is one."""
    if name is not None:
        raise MachineError(
            f"{name}: a learned parameter is no longer a finite number",
            "the loss or its gradient overflowed",
            "finished blocks are kept: run again with a smaller learning rate (--recipe FILE, [learning])",
        )
