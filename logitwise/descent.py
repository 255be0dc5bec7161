"""The loop that learns: steps, rates, held-out checks, and which iterate is kept. Knows nothing of what is learned."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from logitwise.recipe import Learning
from logitwise.watch import Stage


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


def descend(
    parameters: Sequence[tuple[str, nn.Parameter]],
    learn: Callable[[int], Tensor],
    measure: Callable[[], float] | None,
    check: Callable[[], None],
    schedule: Schedule,
    stage: Stage,
    units: float = 1,
    after_step: Callable[[], None] = lambda: None,
) -> Course:
    """Learns, and leaves the iterate that is kept in the parameters.

    Args:
        parameters: each with its role.
        learn: of a step's number, the loss of its batch; its gradient is left in the parameters.
        measure: what the parameters are worth on held-out rows, less being better; None where there are none.
        check: raises where a parameter is no longer a number.
        stage: advances by `units` a step.
        after_step: called after each optimiser step.
    """
    optimizers = Optimizers(parameters, schedule.learning)
    best = _Best([parameter for _, parameter in parameters])
    checks = {round(schedule.steps * i / schedule.checks) for i in range(schedule.checks + 1)}
    losses: list[Tensor] = []
    held_out: list[tuple[int, float]] = []
    step, steps, falls, flat = 0, schedule.steps, schedule.steps, None
    while True:
        if step in checks or step == steps:
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
        loss = learn(step)
        if schedule.choose == "batch":
            best.offer(step, loss.item())
        if schedule.until_flat:
            share = min(1.0, (steps - step) / max(1, steps - falls))
            optimizers.step(partial(_held_rate, steps=schedule.steps, share=share))
        else:
            optimizers.step(partial(rate_at, step=step, steps=steps))
        after_step()
        losses.append(loss.detach())
        step += 1
        stage.advance(units)
    best.restore()
    found = torch.stack(losses).tolist() if losses else []
    return Course(found, held_out, step if best.step is None else best.step, flat)


class _Best:
    """The iterate of the least value offered so far; one of no number is kept only while nothing else is there."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.value = parameters, math.inf
        self.step: int | None = None
        self._iterate: list[Tensor] = []

    def offer(self, step: int, value: float) -> None:
        if self.step is None or value < self.value:
            self.step, self.value = step, math.inf if math.isnan(value) else value
            self._iterate = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best iterate back; the last one stays where nothing was offered."""
        if self.step is not None:
            for parameter, value in zip(self.parameters, self._iterate, strict=True):
                parameter.copy_(value)


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


class Lion(torch.optim.Optimizer):
    """p <- p - rate * (sign(.9 m + .1 g) + decay * p), then m <- .95 m + .05 g (Chen et al., 2023, arXiv 2302.06675).

    The second beta is GSQ's; .99 is usual.
    """

    betas = (0.9, 0.95)

    def __init__(self, params: Iterable[dict[str, list[nn.Parameter]]], decay: float = 0.0) -> None:
        super().__init__(params, {"lr": 0.0, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                direction = state["mean"].lerp(gradient, 1 - self.betas[0])
                state["mean"].lerp_(gradient, 1 - self.betas[1])
                hidden = 0 * direction  # nothing, but NaN where the sign, which is 0 there, would hide it
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.sub_(direction.sign_().add_(hidden), alpha=group["lr"])


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
            how = learning(role)
            self._each.append((_optimizer(how, [{"params": own}]), how))

    def step(self, rate: Callable[[Learning], float]) -> None:
        """One step of each at the rate of its role; gradients are let go."""
        for optimizer, learning in self._each:
            for group in optimizer.param_groups:
                group["lr"] = rate(learning)
            optimizer.step()
            optimizer.zero_grad()


def _optimizer(learning: Learning, group: list[dict[str, list[nn.Parameter]]]) -> torch.optim.Optimizer:
    if learning.optimizer == "sign_sgd":
        return SignSGD(group)
    return Lion(group, learning.decay) if learning.optimizer == "lion" else torch.optim.Adam(group, fused=True)


def rate_at(learning: Learning, step: int, steps: int) -> float:
    """The learning rate of a step, the first being step 0."""
    rate = learning.rate / (steps if learning.per == "fit" else 1)
    if learning.schedule == "constant":
        return rate
    done = step / steps
    fallen = 0.5 * (1 - math.cos(math.pi * done)) if learning.schedule == "cosine" else done
    return rate * (1 - (1 - learning.end) * fallen)


def _held_rate(learning: Learning, steps: int, share: float) -> float:
    """A share of the first step's rate, without the schedule."""
    return share * rate_at(learning, 0, steps)


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
