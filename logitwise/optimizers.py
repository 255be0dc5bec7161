"""Optimisers that torch lacks, one for each role of what is learned, and the rates of their schedules."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from logitwise.recipe import Learning

EPSILON = 1e-15
"""Adam's. Its usual 1e-8 is larger than many gradients of a mean squared error, which shrink with the square of the
hidden states: where these are small, it would hold the fit up."""


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

    def tensors(self) -> dict[str, Tensor]:
        """What the optimisers remember, to be kept."""
        return {
            f"optimizer {index} {parameter} {name}": value
            for index, (optimizer, _) in enumerate(self._each)
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    def restore_from(self, tensors: Mapping[str, Tensor]) -> None:
        """What they remembered, as it was kept."""
        for index, (optimizer, _) in enumerate(self._each):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(own := f"optimizer {index} "):
                    parameter, name = key.removeprefix(own).split(" ")
                    state.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer(learning: Learning, group: list[dict[str, list[nn.Parameter]]]) -> torch.optim.Optimizer:
    if learning.optimizer == "sign_sgd":
        return SignSGD(group)
    if learning.optimizer == "lion":
        return Lion(group, learning.decay)
    return torch.optim.Adam(group, eps=EPSILON, fused=True)


def rate_at(learning: Learning, step: int, steps: int) -> float:
    """The learning rate of a step, the first being step 0."""
    rate = learning.rate / (steps if learning.per == "fit" else 1)
    if learning.schedule == "constant":
        return rate
    done = step / steps
    fallen = 0.5 * (1 - math.cos(math.pi * done)) if learning.schedule == "cosine" else done
    return rate * (1 - (1 - learning.end) * fallen)


def held_rate(learning: Learning, steps: int, share: float) -> float:
    """A share of the first step's rate, without the schedule."""
    return share * rate_at(learning, 0, steps)
