"""A quantized checkpoint and the model it was made from: whether they are a pair, and what is common to their weights.

Some tools rescale a model before they quantize it (AWQ's channel scales, folded into the norm or the projection before
them). Such a checkpoint computes what its original does, with other matrices. It is told by comparison: where rows or
columns of a stored weight are those of the original times factors that differ, the original's weight is no target.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.errors import SourceError
from logitwise.grid import Quantized
from logitwise.skeleton import Skeleton, Slot
from logitwise.source import (
    QuantizedSource,
    Source,
    check_tokenizer,
    check_weights,
    fingerprint,
    open_source,
    open_stored,
)
from logitwise.watch import Watcher

LEAST_COSINE = 0.5
"""Between a stored weight and the original: above .8 at 2 bits, near 0 for weights of another model."""

MOST_SPREAD = 0.1
"""Of the factors of rows or columns, their median absolute deviation over their median: .04 by rounding to 2 bits."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint and its original, found to belong together.

    Args:
        checkpoint: what is refitted.
        student: its modules and weights, dequantized.
        teacher: those of the original.
        slots: every quantized slot.
        rescaled: those whose weight was rescaled before it was quantized.
        digests: of the weights of the original, and of the checkpoint.
    """

    checkpoint: QuantizedSource
    student: Skeleton
    teacher: Skeleton
    slots: list[Slot]
    rescaled: set[Slot] = field(default_factory=set)
    digests: tuple[str, ...] = ()

    @cached_property
    def _quantized(self) -> set[str]:
        return {slot.name for slot in self.slots}

    def kept(self, slot: Slot) -> bool:
        """Whether a slot is in full precision in the checkpoint."""
        return slot.name not in self._quantized

    def fingerprints(self) -> list[str]:
        """Hashes of everything of the two that decides a result."""
        both = (self.teacher.source, self.checkpoint)
        return [fingerprint(source, digest) for source, digest in zip(both, self.digests, strict=True)]

    def stored(self, slot: Slot) -> Quantized:
        """What the checkpoint has for a slot."""
        found = self.checkpoint.quantized(slot.name)
        assert found is not None, slot.name
        return found

    def target(self, slot: Slot) -> Float[Tensor, "out in"]:
        """The weight that a slot's codes stand for: the original's, or where that was rescaled their own, float32."""
        source = self.student.source if slot in self.rescaled else self.teacher.source
        return slot.get({slot.key: source.read(slot.name).float()}).contiguous()


def open_pair(
    checkpoint: str | Path,
    original: str | Path,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
) -> Pair:
    """A quantized checkpoint and its original.

    Errors: SourceError, naming what does not fit: where one is quantized that should not be, or the other way round;
    where tensors, shapes, tokenizers or weights differ by more than quantization explains.
    """
    quantized, source = open_stored(checkpoint), open_source(original, revision)
    if not isinstance(quantized, QuantizedSource):
        raise SourceError(f"{checkpoint} is not quantized", "its weights are in full precision", "quantize it instead")
    if isinstance(source, QuantizedSource):
        raise SourceError(f"{original} is quantized", "its weights are codes", "give the model in full precision")
    check_shapes(quantized, source)
    check_tokenizer(source)
    check_vocabulary(quantized, source)
    student, teacher = Skeleton(quantized, device, dtype), Skeleton(source, device, dtype)
    every = [slot for block in range(len(student)) for slot in student.slots(block)]
    slots = [slot for slot in every if quantized.grid(slot.name) is not None]
    if not slots:
        raise SourceError(f"{checkpoint} has no quantized block", "no layer of its blocks has codes", "give another")
    pair = Pair(quantized, student, teacher, slots)
    with watcher.stage("Comparing both models", 2 * len(source.names()) + len(slots)) as stage:
        digests = [check_weights(one, lambda done, total: stage.advance()) for one in (source, quantized)]
        rescaled = set()
        for slot in slots:
            stored, weight = pair.stored(slot).dequantize(), pair.target(slot)
            cosine, spread = likeness(stored, weight)
            if cosine < LEAST_COSINE:
                raise SourceError(
                    f"{checkpoint} was not quantized from {original}",
                    f"the cosine of {slot.name} with the original's is {cosine:.2f} even where rows and columns may be "
                    "rescaled",
                    "give the model that it was quantized from as --original; rotated checkpoints are not refitted",
                )
            if spread > MOST_SPREAD:
                rescaled.add(slot)
            stage.advance()
    with watcher.stage("Proving the replay", 1) as stage:
        teacher.prove()
        stage.advance()
    if rescaled:
        example = min(rescaled, key=lambda slot: slot.name).module
        watcher.say(
            f"{len(rescaled)} of {len(slots)} layers were rescaled before they were quantized ({example}, ...): they "
            "are fitted from their own weights, with the original as teacher"
        )
    return Pair(quantized, student, teacher, slots, rescaled, tuple(digests))


def check_shapes(model: Source, reference: Source) -> None:
    """Refuses two models whose tensors are not the same by name and shape.

    Errors: SourceError, naming the tensor.
    """
    present = set(model.names())
    for name in reference.names():
        if name not in present or model.shape(name) != reference.shape(name):
            raise SourceError(
                f"{model.name} is not a version of {reference.name}",
                f"{name} is missing or has another shape",
                "give the model that it was quantized from as the original, or --reference",
            )


def check_vocabulary(model: Source, reference: Source) -> None:
    """Refuses a tokenizer that gives tokens other ids than the reference's; it may have more tokens (GGUF)."""
    own, others = model.tokenizer().get_vocab(), reference.tokenizer().get_vocab()
    if different := [token for token, place in others.items() if own.get(token) != place]:
        token = min(different)
        raise SourceError(
            f"{model.name} and {reference.name} have different tokenizers",
            f"{token!r} is {own.get(token, 'no token')} in the one and {others[token]} in the other",
            "give the model that it was quantized from",
        )


def likeness(stored: Float[Tensor, "out in"], weight: Float[Tensor, "out in"]) -> tuple[float, float]:
    """How far a stored weight is the original with rescaled rows and columns.

    Returns: the cosine between the two, once the original's columns and then rows have the factors that fit best by
    least squares; and how much those factors differ, of the more different kind.
    """
    scaled, spread = weight.double(), 0.0
    stored = stored.double()
    for axis in (0, 1):  # a factor for each column, found over rows; then the other way round
        squares = scaled.square().sum(axis, keepdim=True)
        factors = (stored * scaled).sum(axis, keepdim=True) / squares.clamp(min=torch.finfo(torch.float64).tiny)
        known = factors[squares > 0]
        if known.numel():
            middle = known.median()
            spread = max(spread, float((known - middle).abs().median() / middle.abs().clamp(min=1e-12)))
        scaled = scaled * factors
    norms = stored.norm() * scaled.norm()
    return (float((stored * scaled).sum() / norms) if norms > 0 else 1.0), spread
