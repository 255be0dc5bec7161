"""Batches of answers, kept as they are written, so that writing that was stopped goes on where it was."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Keep = Callable[[Sequence[Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Of what a batch asks (JSON values) and what writes it: its tensors as they were kept, or written now and kept.

Batches come in the order of their writing. One that was kept is the one that asked the same after the same batches.
"""


def keep_nothing(asked: Sequence[Any], write: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every batch is written."""
    return write()


def answers_of(
    asked: Sequence[Any],
    write: Callable[[], list[list[int]]],
    keep: Keep,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The answers to a batch as token ids, kept or written now.

    Args:
        asked: what the batch asks, in JSON values.
        write: gives the answers.
        keep: where they are kept.
        generator: what the writing draws from; it is left as the writing leaves it.
    """

    def tensors() -> dict[str, Tensor]:
        answers = write()
        ids = torch.tensor([token for answer in answers for token in answer], dtype=torch.int32)
        found = {"ids": ids, "lengths": torch.tensor([len(answer) for answer in answers])}
        return found if generator is None else found | {"generator": generator.get_state()}

    kept = keep(asked, tensors)
    if generator is not None:
        generator.set_state(kept["generator"])
    return [answer.tolist() for answer in kept["ids"].split(kept["lengths"].tolist())]
