"""Folds: where a scale moves from one part of a block into another and the block computes what it did.

A producer's channels are divided by s > 0, and the columns of every weight that reads them are multiplied by s. The
producer is a norm (its vectors), or a projection (its rows and bias) with nothing behind it but what passes a positive
factor on: a product with a gate, ReLU, attention's mixing of values. Which parts of a block these are is not written
down for each family but tried: one producer is divided by random powers of two, who then reads exactly so much less is
a reader, and with the readers' columns multiplied the block's output must be what it was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.skeleton import Call, Skeleton, Slot
from logitwise.watch import Stage

PROOF_ROWS, PROOF_TOKENS = 2, 16

PROOF_TOLERANCE = 1e-5
"""Of the largest output: how far a proven fold may move a block's output in float32."""

LEFT_OF_THE_EFFECT = 1e-4
"""Of what the producer's change does alone: what may be left of it when the readers make up for it.

A block's output is its input and a little more, so that a small effect would pass by the tolerance alone.
"""

OFFSETS = (0.0, 1.0)
"""A norm multiplies by its weight, or (Gemma's) by 1 + weight."""


@dataclass(frozen=True)
class Fold:
    """A producer of channels and the slots that read them.

    Args:
        block: where it is.
        producer: the module's name in its block (`mlp.up_proj`).
        vectors: its 1-D parameters by their names in the block; of a norm, the weight is the first.
        offset: what the norm adds to its weight before it multiplies; 0 for a projection.
        rows: the slot whose rows these channels are; None for a norm.
        first, size: the producer's channels; a projection may hold several parts one below another.
        readers: the slots whose inputs these channels are, all the same.
    """

    block: int
    producer: str
    vectors: tuple[str, ...]
    offset: float
    rows: Slot | None
    first: int
    size: int
    readers: tuple[Slot, ...] = ()

    @property
    def slots(self) -> list[Slot]:
        """Every matrix that it changes."""
        return [*self.readers, *([] if self.rows is None else [self.rows])]

    def read_weight(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "out size"]:
        """The readers' weights, one below another: they have inputs in common, and rows are rounded alone."""
        return torch.cat([reader.get(weights) for reader in self.readers])

    def spread(self, scale: Float[Tensor, " size"], length: int) -> Float[Tensor, " length"]:
        """The scale along all of the producer's channels: 1 for those that are not this fold's."""
        whole = torch.ones(length, dtype=scale.dtype, device=scale.device)
        whole[self.first : self.first + self.size] = scale
        return whole

    def divided(self, weights: Mapping[str, Tensor], scale: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """The producer's parameters, divided by `scale`, in float32."""
        changed = self.divided_vectors(weights, scale)
        if self.rows is not None:
            weight = self.rows.get(weights)
            changed[self.rows.key] = self.rows.put(weight / self.spread(scale, len(weight)).unsqueeze(1))
        return changed

    def divided_vectors(self, vectors: Mapping[str, Tensor], scale: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """The producer's vectors, divided by `scale`, in float32."""
        changed: dict[str, Tensor] = {}
        for key in self.vectors:
            vector = vectors[key].float()
            by = self.spread(scale, len(vector))
            changed[key] = torch.where(by == 1, vector, (vector + self.offset) / by - self.offset)
        return changed

    def multiplied(self, weights: Mapping[str, Tensor], scale: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """The readers' parameters with their columns multiplied by `scale`."""
        return {reader.key: reader.put(reader.get(weights) * scale) for reader in self.readers}

    def storable(
        self, target: Float[Tensor, " size"], weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Float[Tensor, " size"]:
        """The scale near `target` by which the producer's vectors can be divided, as they are stored in `dtype`.

        One vector: v' = round(v / target) is stored, and the scale is what that makes it, v / v'. Two vectors cannot
        be rounded by one scale, so it is a power of two, which rounds neither. 1 where a norm's weight is 0, or where
        the quotient is not a normal number of that type. A bias of 0 takes any scale.
        """
        together = len(self.vectors) > 1
        scale = torch.exp2(torch.log2(target).round()) if together else target
        usable = torch.isfinite(scale) & (scale > 0)
        for place, key in enumerate(self.vectors):
            gain = weights[key][self.first : self.first + self.size].float() + self.offset
            stored = (gain / scale - self.offset).to(dtype).float() + self.offset
            normal = torch.isfinite(stored) & (stored.abs() >= torch.finfo(dtype).tiny) & (gain != 0)
            if together:
                normal &= stored * scale == gain
            else:
                scale = torch.where(normal, gain / stored, scale)
            is_bias = self.rows is not None or place > 0
            usable &= normal | (is_bias & (gain == 0))
        return torch.where(usable, scale, torch.ones_like(scale))


@torch.no_grad()
def find_folds(skeleton: Skeleton, stage: Stage) -> list[Fold]:
    """Every fold of a model, proven; one block is in memory at a time, and `stage` advances by one for each.

    `skeleton` computes in float32, where powers of two round nothing.
    """
    ids = torch.zeros(PROOF_ROWS, PROOF_TOKENS, dtype=torch.int64)
    shape, generator = skeleton.embed(ids).shape, torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(skeleton.device)
    found: list[Fold] = []
    for block, call in enumerate(skeleton.calls(PROOF_TOKENS)):
        found += _of_block(skeleton, block, hidden, call, generator)
        stage.advance()
    return found


def _of_block(skeleton: Skeleton, block: int, hidden: Tensor, call: Call, generator: torch.Generator) -> list[Fold]:
    weights = skeleton.load_block(block)
    own, seen = skeleton.run_seen(block, weights, hidden, call)
    found: list[Fold] = []
    for fold in _producers(skeleton, block):
        exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, (fold.size,), generator=generator)]
        scale = torch.exp2(exponents).to(skeleton.device)
        divided = weights | fold.divided(weights, scale)
        moved, reads = skeleton.run_seen(block, divided, hidden, call)
        readers = tuple(
            slot
            for slot in skeleton.slots(block)
            if slot.in_features == fold.size and _near(reads[slot.key] * scale, seen[slot.key])
        )
        taken = {reader for other in found for reader in other.readers}
        alike = all(torch.equal(seen[reader.key], seen[readers[0].key]) for reader in readers)
        if not readers or taken & {*readers} or not alike:
            continue
        fold = replace(fold, readers=readers)
        whole = skeleton.run(block, divided | fold.multiplied(divided, scale), hidden, call)
        effect = float((moved - own).abs().max())
        if _near(whole, own) and float((whole - own).abs().max()) <= LEFT_OF_THE_EFFECT * effect and effect > 0:
            found.append(fold)
    return found


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= PROOF_TOLERANCE * other.abs().max())


def _producers(skeleton: Skeleton, block: int) -> Iterator[Fold]:
    """What may be a producer, its readers not known: modules that have nothing but vectors, then slots."""
    slots = skeleton.slots(block)
    sizes, linear = sorted({slot.in_features for slot in slots}), {slot.key.removesuffix(".weight") for slot in slots}
    for path, module in skeleton.blocks[block].named_modules():
        own = {f"{path}.{name}".removeprefix("."): p for name, p in module.named_parameters(recurse=False)}
        lengths = {p.shape for p in own.values()}
        if path not in linear and len(lengths) == 1 and (shape := lengths.pop()) in {(size,) for size in sizes}:
            for offset in OFFSETS if len(own) == 1 else OFFSETS[:1]:
                yield Fold(block, path, tuple(own), offset, None, 0, shape[0])
    keys = {key for key, _ in skeleton.blocks[block].named_parameters()}
    for slot in slots:
        path = slot.key.removesuffix(".weight")
        biases = tuple({f"{path}.bias"} & keys)
        for size in sizes:
            if slot.out_features % size == 0:
                for first in range(0, slot.out_features, size):
                    yield Fold(block, path, biases, 0.0, slot, first, size)
