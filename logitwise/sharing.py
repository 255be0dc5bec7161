"""Who learns the quantizers of a window: one process all of them, or each of several ranks its own.

What a quantizer does to a weight, forward and backward, and its optimiser's step take as long on every rank however few
rows it has. So every slot has an owner, who gives all ranks the weight that its quantizer stands for; what each rank's
rows ask of that weight is summed at the owner, who alone learns. (As ZeRO shares out an optimiser: Rajbhandari et al.,
2020, arXiv 1910.02054.)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.descent import Halfway
from logitwise.quantizers import Quantizer
from logitwise.ranks import Ranks
from logitwise.skeleton import Slot

WeightsOf = Callable[[Mapping[Slot, Quantizer], float], dict[Slot, Tensor]]
"""What quantizers stand for at a point of the fit (0 at its start, 1 at its end): weights [out, in]."""
Through = Callable[[Mapping[Slot, nn.Parameter]], Callable[[Tensor], Tensor]]
"""A window with these weights in its slots, to go backward through to them."""


class Alone:
    """Quantizers that this process learns.

    Args:
        own: by slot.
        forward: the window with their weights: (hidden states, progress) -> its output.
        weights_of: what they stand for.
    """

    def __init__(
        self, own: dict[Slot, Quantizer], forward: Callable[[Tensor, float], Tensor], weights_of: WeightsOf
    ) -> None:
        self.own, self.forward, self.weights_of = own, forward, weights_of

    def backward(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Leaves the gradient of a loss in the parameters of `own`; returns the loss of all ranks."""
        loss.backward()
        return loss.detach()

    def weights(self) -> Mapping[Slot, Float[Tensor, "out in"]]:
        """What all quantizers stand for at the end of the fit."""
        return self.weights_of(self.own, 1.0)

    def first_of_all(self, found: str | None) -> str | None:
        """What this rank has found, or else what another has."""
        return found

    def halfway(self, given: Halfway | None) -> Halfway | None:
        """How far `own` are, kept there."""
        return given and Halfway(given.due, given.save, lambda: _only(given, 1))

    def finish(self) -> None:
        """Afterwards this process has all quantizers as they were learned."""
        return None


class Shared(Alone):
    """Quantizers of which this rank learns its own.

    Args:
        quantizers: of all ranks, alike, by slot.
        ranks: who shares them.
        through: the window with weights that are given.
        weights_of: what quantizers stand for.
        dtype, device: the type that blocks are computed in, and where.
    """

    def __init__(
        self,
        quantizers: dict[Slot, Quantizer],
        ranks: Ranks,
        through: Through,
        weights_of: WeightsOf,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.ranks, self.quantizers, self.owner = ranks, quantizers, owners(list(quantizers), ranks.world)
        own = {slot: quantizer for slot, quantizer in quantizers.items() if self.owner[slot] == ranks.rank}
        self.weights_by_rank, views = rows_of(self.owner, ranks.world, dtype, device)
        self.gradients_by_rank, self.gradients = rows_of(self.owner, ranks.world, dtype, device)
        self.leaves = {slot: nn.Parameter(view) for slot, view in views.items()}
        for slot, leaf in self.leaves.items():
            leaf.grad = self.gradients[slot]
        run = through(self.leaves)

        def forward(hidden: Tensor, progress: float) -> Tensor:
            self.computed = weights_of(own, progress)
            self._give(self.computed)
            return run(hidden)

        super().__init__(own, forward, weights_of)

    def backward(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        loss = super().backward(loss)
        self.ranks.add([loss])
        self.ranks.sum_own(self.gradients_by_rank)
        if self.own:
            gradients = [self.gradients[slot].to(weight.dtype) for slot, weight in self.computed.items()]
            torch.autograd.backward(list(self.computed.values()), gradients)
        self.gradients_by_rank.zero_()
        return loss

    @torch.no_grad()
    def weights(self) -> Mapping[Slot, Float[Tensor, "out in"]]:
        self._give(super().weights())
        return self.leaves

    @torch.no_grad()
    def _give(self, computed: Mapping[Slot, Tensor]) -> None:
        """Every rank has the weights of all."""
        for slot, weight in computed.items():
            self.leaves[slot].copy_(weight)
        self.ranks.exchange(self.weights_by_rank)

    def first_of_all(self, found: str | None) -> str | None:
        return next(filter(None, self.ranks.everyones(found)), None)

    def halfway(self, given: Halfway | None) -> Halfway | None:
        if given is None:
            return None
        mine = f"rank {self.ranks.rank} "

        def save(tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
            given.save(self.ranks.gather(tensors), figures | {"ranks": self.ranks.world})

        def load() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
            if (found := _only(given, self.ranks.world)) is None:
                return None
            tensors, figures = found
            return {n.removeprefix(mine): t for n, t in tensors.items() if n.startswith(mine)}, figures

        return Halfway(given.due, save, load)

    def finish(self) -> None:
        self.ranks.give(self._states())

    def _states(self) -> Iterator[tuple[int, Tensor]]:
        for slot, quantizer in self.quantizers.items():
            yield from ((self.owner[slot], tensor) for tensor in quantizer.state_dict().values())


def owners(slots: list[Slot], world: int) -> dict[Slot, int]:
    """A rank for each slot, so that all have about as many weights: the largest first, to whom has least."""
    loads, found = [0] * world, dict[Slot, int]()
    for slot in sorted(slots, key=lambda slot: -slot.out_features * slot.in_features):
        found[slot] = loads.index(min(loads))
        loads[found[slot]] += slot.out_features * slot.in_features
    return found


def rows_of(
    owner: Mapping[Slot, int], world: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "world n"], dict[Slot, Float[Tensor, "out in"]]]:
    """Zeros, a row for each rank, and in each row a place for every slot of that rank: all are sent at once."""
    places, ends = dict[Slot, slice](), [0] * world
    for slot, rank in owner.items():
        begin = ends[rank]
        ends[rank] = begin + slot.out_features * slot.in_features
        places[slot] = slice(begin, ends[rank])
    rows = torch.zeros(world, max(ends), dtype=dtype, device=device)
    views = {s: rows[owner[s], place].view(s.out_features, s.in_features) for s, place in places.items()}
    return rows, views


def _only(given: Halfway, world: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """How far it is, if so many ranks kept it: another number has other parts of it."""
    found = given.load()
    return None if found is None or found[1].get("ranks", 1) != world else found
