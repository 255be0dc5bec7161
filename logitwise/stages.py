"""Stages inside a block: some of its slots are fitted before the rest, by an error that is taken inside the block.

A stage learns its slots against what the block in full precision puts out at the stage's place, both on the student's
inputs; slots of earlier stages have the weights they were given, those of later ones full precision. What no stage
names is fitted last, by the objective, at the window's end. Stages are a method's data (`recipes/*.toml`), or the
recipe's.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from logitwise.activations import Streams
from logitwise.descent import Schedule
from logitwise.errors import SourceError
from logitwise.fit import Data, Fitted, Window, fit
from logitwise.objectives import Objective
from logitwise.quantizers import Quantizer
from logitwise.recipe import BlockStage
from logitwise.skeleton import Slot
from logitwise.watch import Stage


@dataclass(frozen=True)
class Part:
    """What one stage is in a block.

    Args:
        slots: what it learns.
        ends: the modules, by their names in the block, at whose outputs its error is taken.
        weights: how many weights a token meets on its way there, but for those of no stage.
    """

    slots: tuple[Slot, ...]
    ends: tuple[str, ...]
    weights: int


class Inside(Window):
    """A window of one block that ends at modules inside it: it puts out what they do, side by side.

    Args:
        window: the whole window, whose weights this one shares.
        ends: the modules, by their names in the block; what comes after them is not run.

    Errors: SourceError, when it is run, where the block does not call one of them.
    """

    def __init__(self, window: Window, ends: tuple[str, ...]) -> None:
        (_,) = window.blocks
        vars(self).update(vars(window))  # nothing is loaded again
        self.ends = ends

    def run_block(self, block: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        module, found = self.skeleton.blocks[block], dict[str, Tensor]()

        def note(end: str, called: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found[end] = output[0] if isinstance(output, tuple) else output
            if len(found) == len(self.ends):
                raise _Reached

        hooks = [module.get_submodule(end).register_forward_hook(partial(note, end)) for end in self.ends]
        try:
            with suppress(_Reached):
                super().run_block(block, weights, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [end for end in self.ends if end not in found]:
            raise SourceError(
                f"block {block + 1} does not call {', '.join(missing)}",
                "no error can be taken at the output of what only holds other modules",
                "choose other stages, or --set stages=[]",
            )
        return torch.cat([found[end] for end in self.ends], -1)


class _Reached(Exception):
    """Raised to leave a block's forward once all that is asked for was put out."""


def parts_of(stages: Sequence[BlockStage], slots: Sequence[Slot], kept: Callable[[Slot], bool]) -> list[Part]:
    """The stages of a block that learn anything there.

    A slot that several stages name belongs to the first of them. Where an error is taken does not depend on which slots
    are kept in full precision.

    Args:
        stages: in order.
        slots: all of the block.
        kept: which of them stay in full precision.
    """
    found: list[Part] = []
    left, weights = list(slots), 0
    for stage in stages:
        named = [slot for slot in left if any(fnmatch(slot.module, pattern) for pattern in stage.slots)]
        left = [slot for slot in left if slot not in named]
        weights += sum(slot.out_features * slot.in_features for slot in named)
        if learned := tuple(slot for slot in named if not kept(slot)):
            own, common = tuple(map(_module, learned)), (_shared([_module(slot) for slot in named]),)
            found.append(Part(learned, own if stage.at == "own" else common, weights))
    return found


def widest_end(stages: Sequence[BlockStage], slots: Sequence[Slot], width: int) -> int:
    """How wide that is at most of which a stage keeps what the teacher puts out; `width` is that of hidden states."""
    outputs = {_module(slot): slot.out_features for slot in slots}
    parts = parts_of(stages, slots, lambda slot: False)
    return max((sum(outputs.get(end, width) for end in part.ends) for part in parts), default=0)


def _module(slot: Slot) -> str:
    """The name in its block of the module that holds a slot."""
    return slot.key.removesuffix(".weight")


def _shared(modules: list[str]) -> str:
    """The smallest module that holds all of these; the block itself has no name."""
    levels = zip(*(module.split(".") for module in modules), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def fit_parts(
    parts: Sequence[Part],
    window: Window,
    quantizers: Mapping[Slot, Quantizer],
    objective: Objective,
    data: Data,
    schedule: Schedule,
    stage: Stage,
    units: Callable[[Part], float] = lambda part: 1,
    streams: Streams | None = None,
) -> list[Fitted]:
    """Fits each part in turn, with all the steps of the schedule; held-out rows choose by the part's own error.

    Args:
        window: one block; what it is afterwards is `window.fixing` what the parts came to.
        quantizers: of all slots; those of the parts are left as they were fitted.
        objective: the error.
        data: its targets are not looked at.
        units: what a step of a part advances `stage` by.
        streams: where its targets are; on the device by default.
    """
    found: list[Fitted] = []
    student = window
    for part in parts:
        teacher = Inside(window, part.ends)
        with torch.no_grad():
            targets = _of_all(teacher, data, schedule.batch, streams or Streams.on(data.weights.device))
        own = {slot: quantizers[slot] for slot in part.slots}
        ending, inside = Inside(student, part.ends), replace(data, targets=targets)
        # New rows come only once; those there are come again and again, whatever the last stage learns from.
        again = replace(schedule, until_flat=False)
        found.append(fit(ending, own, objective, None, inside, again, stage, units(part)))
        student = student.fixing({slot: q.dequantize() for slot, q in found[-1].quantized.items()})
        del targets, inside  # before the next are there
    return found


def _of_all(window: Window, data: Data, batch: int, streams: Streams) -> Tensor:
    """What a window puts out for all rows."""
    found: list[Tensor] = []
    for start in range(0, len(data.inputs), batch):
        leaving = window.forward(data.entering(slice(start, start + batch)), {})
        if not found:
            found.append(streams.empty((len(data.inputs), *leaving.shape[1:]), leaving.dtype))
        found[0][start : start + batch] = leaving
    return found[0]
