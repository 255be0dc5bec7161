"""Fits one window: one block or K blocks, by any method and any objective. Knows none of them by name."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from logitwise.errors import MachineError
from logitwise.grid import Grid, Quantized
from logitwise.learnable import LearnableBlock, LearnableBlocks
from logitwise.objectives import Objective, Taps
from logitwise.quantizers import Quantizer, Start
from logitwise.recipe import Learning
from logitwise.skeleton import Call, Head, Skeleton, Slot
from logitwise.watch import Stage


class Window:
    """Consecutive blocks with their full-precision weights.

    Args:
        skeleton: whose blocks they are.
        blocks: which.
        calls: how each block of the model is called.
        kept: slots that stay in full precision.
    """

    def __init__(self, skeleton: Skeleton, blocks: range, calls: list[Call], kept: Callable[[Slot], bool]) -> None:
        self.skeleton, self.blocks, self.calls = skeleton, blocks, calls
        self.weights = {block: skeleton.load_block(block, dtype=torch.float32) for block in blocks}
        self.slots = [slot for block in blocks for slot in skeleton.slots(block) if not kept(slot)]

    def quantizers(self, method: type[Quantizer], grid: Grid, start: Start) -> dict[Slot, Quantizer]:
        """A quantizer for each slot, at its start."""
        return {s: method.start(s.get(self.weights[s.block]).contiguous(), grid, start) for s in self.slots}

    def forward(
        self, hidden: Float[Tensor, "rows tokens d"], replaced: Mapping[Slot, Tensor]
    ) -> Float[Tensor, "rows tokens d"]:
        """The window's output, with the float32 weights [out, in] of some slots replaced."""
        for block in self.blocks:
            hidden = self._run(block, hidden, replaced)
        return hidden

    def _run(self, block: int, hidden: Tensor, replaced: Mapping[Slot, Tensor]) -> Tensor:
        dtype = self.skeleton.dtype
        weights = {key: weight.to(dtype) for key, weight in self.weights[block].items()}
        for slot, weight in replaced.items():
            if slot.block == block:
                weights[slot.key] = slot.put(weight.to(dtype))
        return self.skeleton.run(block, weights, hidden, self.calls[block])

    def learn(self, quantizers: Mapping[Slot, Quantizer]) -> Callable[[Tensor, float], Tensor]:
        """The window with the quantizers' weights, to go backward through: (hidden states, progress) -> its output."""
        now = 0.0

        def block_of(block: int) -> LearnableBlock:
            own = {slot: quantizer for slot, quantizer in quantizers.items() if slot.block == block}
            return LearnableBlock(lambda hidden: self._run(block, hidden, weights_of(own, now)), list(own.values()))

        weights = sum(slot.out_features * slot.in_features for slot in quantizers)
        may_record = not any(quantizer.reads_progress for quantizer in quantizers.values())
        blocks = LearnableBlocks([block_of(block) for block in self.blocks], weights, may_record)

        def forward(hidden: Tensor, progress: float) -> Tensor:
            nonlocal now
            now = progress
            return blocks(hidden)

        return forward

    @torch.no_grad()
    def advance(self, hidden: Float[Tensor, "rows tokens d"], replaced: Mapping[Slot, Tensor], batch: int) -> None:
        """`hidden` in place becomes the window's output."""
        for start in range(0, hidden.shape[0], batch):
            part = slice(start, start + batch)
            hidden[part] = self.forward(hidden[part], replaced)


@dataclass(frozen=True)
class Data:
    """What a window is fitted on: the student's inputs, the teacher's outputs, and which rows choose.

    Args:
        inputs: what the student's window reads, [rows, tokens, d].
        targets: what the teacher's window puts out, [rows, tokens, d].
        weights: how much each position counts, [rows, tokens].
        following: the token after each position, [rows, tokens].
        train: the first rows, which are learned from.
        held_out: the last rows, which choose the iterate.
    """

    inputs: Float[Tensor, "rows tokens d"]
    targets: Float[Tensor, "rows tokens d"]
    weights: Float[Tensor, "rows tokens"]
    following: Int64[Tensor, "rows tokens"]
    train: int
    held_out: int

    def taps(self, rows: Tensor | slice, student: Float[Tensor, "rows tokens d"], head: Head | None) -> Taps:
        """What an objective sees of some rows."""
        return Taps(student, self.targets[rows], self.weights[rows], self.following[rows], head)


@dataclass(frozen=True)
class Schedule:
    """How long and how a window is fitted.

    Args:
        steps: optimiser steps.
        batch: rows a step.
        checks: how often held-out rows are asked on the way, the start apart.
        learning: how the parameters of a role are learned.
        seed: decides the order of the rows.
        choose: which iterate is kept: the best on the held-out rows, or on the batch of its own step, or the last.
    """

    steps: int
    batch: int
    checks: int
    learning: Callable[[str], Learning]
    seed: int
    choose: str = "held_out"


@dataclass(frozen=True)
class Fitted:
    """The outcome of a fit.

    Args:
        quantized: what is stored, by slot.
        losses: the training loss of every step.
        held_out: (step, held-out measure), in order; empty where no rows are held out.
        kept: the step whose iterate was kept.
    """

    quantized: dict[Slot, Quantized]
    losses: list[float]
    held_out: list[tuple[int, float]]
    kept: int


def fit(
    window: Window,
    quantizers: dict[Slot, Quantizer],
    objective: Objective,
    head: Head | None,
    data: Data,
    schedule: Schedule,
    stage: Stage,
    units: float = 1,
) -> Fitted:
    """Learns the quantizers of a window and keeps the iterate that is best on the held-out rows.

    `stage` advances by `units` a step.

    Errors: MachineError, naming the layer, where a parameter stops being a number.
    """
    optimizers = Optimizers(
        ((role, p) for q in quantizers.values() for role, parameters in q.groups().items() for p in parameters),
        schedule.learning,
    )
    learn = window.learn(quantizers)
    order = row_order(data.train, schedule.batch, schedule.seed)
    checks = {round(schedule.steps * (i + 1) / schedule.checks) for i in range(schedule.checks)} | {0}
    losses: list[Tensor] = []
    held_out: list[tuple[int, float]] = []
    best = _Best(quantizers, schedule.steps)
    for step in range(schedule.steps + 1):
        if data.held_out and step in checks:
            _refuse_not_a_number(quantizers)
            value = measure(window, weights_of(quantizers, 1.0), objective, head, data, schedule.batch)
            if schedule.choose == "held_out":
                best.offer(step, value)
            held_out.append((step, value))
        if step == schedule.steps:
            break
        rows = next(order).to(data.inputs.device)
        student = learn(data.inputs[rows], step / schedule.steps)
        loss = objective.loss(data.taps(rows, student, head))
        if schedule.choose == "batch":
            best.offer(step, loss.item())
        loss.backward()
        optimizers.step(partial(rate_at, step=step, steps=schedule.steps))
        for quantizer in quantizers.values():
            quantizer.after_step()
        losses.append(loss.detach())
        stage.advance(units)
    _refuse_not_a_number(quantizers)
    best.restore()
    quantized = {slot: quantizer.freeze() for slot, quantizer in quantizers.items()}
    return Fitted(quantized, torch.stack(losses).tolist() if losses else [], held_out, best.step)


class _Best:
    """The iterate of the least value offered so far; what is no number is kept only while nothing else is there."""

    def __init__(self, quantizers: Mapping[Slot, Quantizer], last: int) -> None:
        self.quantizers, self.step, self.value = quantizers, last, math.inf
        self.state: list[Tensor] | None = None

    def offer(self, step: int, value: float) -> None:
        if self.state is None or value < self.value:
            self.step, self.value = step, math.inf if math.isnan(value) else value
            self.state = [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best iterate back; the last one stays where nothing was offered."""
        for parameter, value in zip(self._parameters(), self.state or [], strict=False):
            parameter.copy_(value)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for quantizer in self.quantizers.values() for parameter in quantizer.parameters())


def weights_of(quantizers: Mapping[Slot, Quantizer], progress: float) -> dict[Slot, Tensor]:
    """The weights that the quantizers stand for at a point of the fit."""
    return {slot: quantizer(progress) for slot, quantizer in quantizers.items()}


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
        student = window.forward(data.inputs[part], weights)
        added, counted = objective.measure(data.taps(part, student, head))
        total, count = total + added, count + counted
    return total / count


class SignSGD(torch.optim.Optimizer):
    """p <- p - rate * sign(gradient), as SignRound is published."""

    def __init__(self, params: Iterable[dict[str, list[nn.Parameter]]]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                # The sign of NaN is 0, which would hide it.
                parameter.sub_(parameter.grad.sign() + 0 * parameter.grad, alpha=group["lr"])


class Optimizers:
    """An optimiser for each role, as the recipe says.

    torch's schedulers are not used: they and their optimiser hold each other, so that a window's parameters would stay
    in memory until Python looks for cycles.

    Args:
        parameters: each with its role.
        learning: how a role is learned.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], learning: Callable[[str], Learning]) -> None:
        by_role: dict[str, list[nn.Parameter]] = {}
        for role, parameter in parameters:
            by_role.setdefault(role, []).append(parameter)
        self._each: list[tuple[torch.optim.Optimizer, Learning]] = []
        for role, own in by_role.items():
            how, group = learning(role), [{"params": own}]
            sign = how.optimizer == "sign_sgd"
            self._each.append((SignSGD(group) if sign else torch.optim.Adam(group, fused=True), how))

    def step(self, rate: Callable[[Learning], float]) -> None:
        """One step of each at the rate of its role; gradients are let go."""
        for optimizer, learning in self._each:
            for group in optimizer.param_groups:
                group["lr"] = rate(learning)
            optimizer.step()
            optimizer.zero_grad()


def rate_at(learning: Learning, step: int, steps: int) -> float:
    """The learning rate of a step, the first being step 0."""
    rate = learning.rate / (steps if learning.per == "fit" else 1)
    if learning.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * (1 - step / steps)


def row_order(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of row numbers: every row once before any twice, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    pending = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pending) < batch:
            pending = torch.cat([pending, torch.randperm(rows, generator=generator)])
        yield pending[:batch]
        pending = pending[batch:]


def _refuse_not_a_number(quantizers: Mapping[Slot, Quantizer]) -> None:
    for slot, quantizer in quantizers.items():
        if not all(bool(torch.isfinite(parameter).all()) for parameter in quantizer.parameters()):
            raise MachineError(
                f"{slot.name}: a learned parameter is no longer a finite number",
                "the loss or its gradient overflowed",
                "finished blocks are kept: run again with a smaller learning rate (--recipe FILE, [learning])",
            )
