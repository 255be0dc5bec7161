"""The loop that learns: steps, rates, held-out checks, and which iterate is kept. Knows nothing of what is learned."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from logitwise.optimizers import Optimizers, held_rate, rate_at
from logitwise.recipe import Learning
from logitwise.watch import Stage

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Schedule:
    """How long and how something is learned.

    Args:
        steps: optimiser steps, at most.
        batch: rows a step.
        checks: how often held-out rows are asked on the way, the start apart.
        learning: how the parameters of a role are learned.
        seed: decides the order of the rows.
        choose: which iterate is kept: the best on the held-out rows, or on the batch of its own step, or the last.
        until_flat: rates do not follow their schedule, but stay until the held-out measure is flat, or four fifths of
            the steps are done, and fall to 0 in a quarter of the steps done by then. For rows that do not come again.
    """

    steps: int
    batch: int
    checks: int
    learning: Callable[[str], Learning]
    seed: int
    choose: Literal["held_out", "batch", "last"] = "held_out"
    until_flat: bool = False


@dataclass(frozen=True)
class Course:
    """How it went.

    Args:
        losses: the training loss of every step.
        held_out: (step, held-out measure), in order; step 0 is the start; empty where no rows are held out.
        kept: the step whose iterate was kept.
        flat: the step at which the held-out measure was found flat; None where it never was, or was not looked for.
    """

    losses: list[float]
    held_out: list[tuple[int, float]]
    kept: int
    flat: int | None


@dataclass(frozen=True)
class Halfway:
    """Where a descent keeps how far it is, at every check, so that it can be gone on with.

    Args:
        due: whether it is time to keep it.
        save: keeps tensors and figures (JSON values) in place of those of before.
        load: gives them back; None where there are none.
    """

    due: Callable[[], bool]
    save: Callable[[dict[str, Tensor], dict[str, Any]], None]
    load: Callable[[], tuple[dict[str, Tensor], dict[str, Any]] | None]


def descend(
    parameters: Sequence[tuple[str, nn.Parameter]],
    batches: Callable[[int], Generator[Batch, None, None]],
    learn: Callable[[int, Batch], Tensor],
    measure: Callable[[], float] | None,
    check: Callable[[], None],
    schedule: Schedule,
    stage: Stage,
    units: float = 1,
    after_step: Callable[[], None] = lambda: None,
    halfway: Halfway | None = None,
) -> Course:
    """Learns, and leaves the iterate that is kept in the parameters.

    Args:
        parameters: each with its role.
        batches: what each step learns from, without end, those of the steps that are done passed over.
        learn: of a step's number and batch, the loss; its gradient is left in the parameters.
        measure: what the parameters are worth on held-out rows, less being better; None where there are none.
        check: raises where a parameter is no longer a number.
        stage: advances by `units` a step.
        after_step: called after each optimiser step.
        halfway: where it goes on from, and keeps how far it is; for what has no state but these parameters.
    """
    optimizers = Optimizers(parameters, schedule.learning)
    best = _Best([parameter for _, parameter in parameters])
    checks = {round(schedule.steps * i / schedule.checks) for i in range(schedule.checks + 1)}
    losses: list[Tensor] = []
    held_out: list[tuple[int, float]] = []
    step, steps, falls, flat = 0, schedule.steps, schedule.steps, None
    asked = None  # the check that was done before it was kept
    if halfway is not None and (resumed := halfway.load()) is not None:
        tensors, figures = resumed
        step, steps, falls, flat = (figures[name] for name in ("step", "steps", "falls", "flat"))
        held_out = [(at, value) for at, value in figures["held_out"]]
        losses = list(tensors["losses"].unbind())
        best.restore_from(tensors, figures["best"])
        optimizers.restore_from(tensors)
        with torch.no_grad():
            for index, (_, parameter) in enumerate(parameters):
                parameter.copy_(tensors[f"parameter {index}"])
        stage.advance(units * step)
        asked = step
        del resumed, tensors  # as much memory as the fit itself
    with closing(batches(step)) as arriving:
        while True:
            if (step in checks or step == steps) and step != asked:
                check()
                if measure is not None:
                    held_out.append((step, measure()))
                    if schedule.choose == "held_out":
                        best.offer(*held_out[-1])
                    if schedule.until_flat and falls == schedule.steps and is_flat([value for _, value in held_out]):
                        flat = step
            if schedule.until_flat and falls == schedule.steps and (flat is not None or step >= 0.8 * steps):
                falls, steps = step, min(steps, step + max(1, step // 4))
            if step == steps:
                break
            if halfway is not None and step in checks and step not in (0, asked) and halfway.due():
                now = {f"parameter {index}": parameter.detach() for index, (_, parameter) in enumerate(parameters)}
                now |= {"losses": _stacked(losses)} | best.tensors() | optimizers.tensors()
                figures = {"step": step, "steps": steps, "falls": falls, "flat": flat, "held_out": held_out}
                halfway.save(now, figures | {"best": [best.step, best.value]})
            loss = learn(step, next(arriving))
            if schedule.choose == "batch":
                best.offer(step, loss.item())
            if schedule.until_flat:
                share = min(1.0, (steps - step) / max(1, steps - falls))
                optimizers.step(partial(held_rate, steps=schedule.steps, share=share))
            else:
                optimizers.step(partial(rate_at, step=step, steps=steps))
            after_step()
            losses.append(loss.detach())
            step += 1
            stage.advance(units)
    best.restore()
    found = _stacked(losses).tolist() if losses else []
    return Course(found, held_out, step if best.step is None else best.step, flat)


def _stacked(losses: list[Tensor]) -> Tensor:
    """Losses of all steps, where the last of them is; those from before a stop are not there yet."""
    return torch.stack([loss.to(losses[-1].device) for loss in losses])


class _Best:
    """The iterate of the least value offered so far; one of no number is kept only while nothing else is there."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.value = parameters, math.inf
        self.step: int | None = None
        self._iterate: list[Tensor] = []

    def offer(self, step: int, value: float) -> None:
        if self.step is None or value < self.value:
            self.step, self.value = step, math.inf if math.isnan(value) else value
            if not self._iterate:
                self._iterate = [torch.empty_like(parameter) for parameter in self.parameters]
            for kept, parameter in zip(self._iterate, self.parameters, strict=True):
                kept.copy_(parameter.detach())

    def tensors(self) -> dict[str, Tensor]:
        """The iterate, to be kept."""
        return {f"best {index}": value for index, value in enumerate(self._iterate)}

    def restore_from(self, tensors: Mapping[str, Tensor], figures: Sequence[Any]) -> None:
        """The iterate and its step and value, as they were kept."""
        self.step, self.value = figures
        if self.step is not None:
            self._iterate = [tensors[f"best {i}"].to(p.device) for i, p in enumerate(self.parameters)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best iterate back; the last one stays where nothing was offered."""
        if self.step is not None:
            for parameter, value in zip(self.parameters, self._iterate, strict=True):
                parameter.copy_(value)


def row_order(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of row numbers: every row once before any twice, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    pending = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pending) < batch:
            pending = torch.cat([pending, torch.randperm(rows, generator=generator)])
        yield pending[:batch]
        pending = pending[batch:]


def is_flat(values: list[float]) -> bool:
    """Whether the least of a held-out curve fell by less than a hundredth over its last two values.

    Counted from its largest value on: at a high rate a curve rises before it falls.
    """
    falling = values[values.index(max(values)) :]
    return len(falling) > 2 and min(falling[:-2]) - min(falling) < 0.01 * min(falling)
