"""Polish: every scale of the model tuned together under the soft cross-entropy, codes and zero points frozen.

Blocks are fitted one after another, each blind to those after it; what they leave is tuned here, end to end, in what
costs nothing at inference: the scales of all groups, and the vectors that stay in full precision (norms, biases).
EfficientQAT tunes scales so (E2E-QP, arXiv 2407.11062), with the text's next token as a hard label; here the label is
the full-precision model's distribution. How it goes backward through all blocks is learnable.py's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from logitwise.activations import Streams
from logitwise.calibration.rows import Rows
from logitwise.descent import Halfway, Schedule, descend
from logitwise.errors import MachineError
from logitwise.fit import Data, batches_of
from logitwise.grid import Quantized, merge, split, store_through
from logitwise.learnable import LearnableBlock, LearnableBlocks
from logitwise.memory import free_memory
from logitwise.objectives.chunked import positions
from logitwise.objectives.soft import compare, soft_cross_entropy
from logitwise.ranks import ALONE, Ranks
from logitwise.recipe import Recipe
from logitwise.skeleton import Call, Skeleton, Slot
from logitwise.watch import Stage

POLISHED = ("scale", "vector")
"""The roles of what is learned: scales (as log-factors), and norms and biases."""


@dataclass(frozen=True)
class Polished:
    """The outcome of a polish.

    Args:
        scales: by slot's name, [out, groups], in their stored type.
        minima: the same of grids that have float minima, each changed by the factor of its scale.
        vectors: norms and biases by name, in the type the source keeps them in.
        losses: the training loss of every step.
        held_out: (step, held-out KL), in order; step 0 is the model as it came.
        kept: the step whose iterate was kept.
        tokens: how many counted positions were learned from, the same one twice where rows came again.
        flat: the step at which held-out KL was found flat; None where rows were not fresh, or it never was.
    """

    scales: dict[str, Tensor]
    minima: dict[str, Tensor]
    vectors: dict[str, Tensor]
    losses: list[float]
    held_out: list[tuple[int, float]]
    kept: int
    tokens: int
    flat: int | None

    def of(self, name: str, quantized: Quantized) -> Quantized:
        """What is stored for a slot, with the scales that were learned."""
        return replace(quantized, scale=self.scales[name], minimum=self.minima.get(name))


@dataclass
class _Block:
    """What is tuned of one block; its codes too, where there is room for those of all blocks."""

    log_factors: dict[Slot, nn.Parameter]
    vectors: dict[str, nn.Parameter]
    frozen: "_Frozen | None" = None


@dataclass(frozen=True)
class _Frozen:
    """What is not tuned of one block: codes, and matrices that are not quantized."""

    codes: dict[Slot, Quantized]
    matrices: dict[str, Tensor]


class Polish:
    """A quantized model whose scales and vectors are learned.

    Args:
        skeleton: the model, with what stays in full precision.
        recipe: how.
        rows: the rows to learn from, then those held out; `held_out` of the latter.
        quantized: what is stored for a slot.
        kept: slots that stay in full precision.
        teacher: the full-precision model, where it is another than the one whose vectors are learned.
        ranks: who has other rows.
        streams: where hidden states are; on the device by default.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        rows: Rows,
        held_out: int,
        quantized: Callable[[Slot], Quantized],
        kept: Callable[[Slot], bool],
        teacher: Skeleton | None = None,
        ranks: Ranks = ALONE,
        streams: Streams | None = None,
    ) -> None:
        self.streams = streams or Streams.on(skeleton.device)
        self.skeleton, self.recipe, self.held_out, self.rows, self.ranks = skeleton, recipe, held_out, rows, ranks
        self.quantized, self.kept, self.teacher = quantized, kept, teacher or skeleton
        self._stored: dict[str, torch.dtype] = {}  # of norms and biases, by name
        self.resident = self._fits()
        self.blocks = [self._open(block) for block in range(len(skeleton))]
        self.head = skeleton.head()
        self.teacher_head = self.head if teacher is None else teacher.head()
        # Copies: the teacher goes on through the head as it is.
        self.after = [
            {
                key: nn.Parameter(self._noted(f"{name}.{key}").float().clone())
                for key, p in module.named_parameters()
                if p.dim() == 1
            }
            for name, module in zip(self.head.after_names, self.head.after, strict=True)
        ]

    def _fits(self) -> bool:
        """Whether every block's codes may stay on the device, and half of what is free be left."""
        bytes_of_codes = sum(p.numel() for p in self.skeleton.blocks.parameters())
        return bytes_of_codes < free_memory(self.skeleton.device) // 2

    def _open(self, index: int) -> _Block:
        frozen = self._read(index)
        factors = {
            slot: nn.Parameter(torch.zeros_like(q.scale, dtype=torch.float32)) for slot, q in frozen.codes.items()
        }
        vectors = {
            key: nn.Parameter(self._noted(self._name(index, key)).float().clone())
            for key, parameter in self.skeleton.blocks[index].named_parameters()
            if parameter.dim() == 1
        }
        return _Block(factors, vectors, frozen if self.resident else None)

    def _read(self, index: int) -> _Frozen:
        codes = {s: self.quantized(s).to(self.skeleton.device) for s in self.skeleton.slots(index) if not self.kept(s)}
        stored = {slot.key for slot in codes}
        matrices = {
            key: self._source(self._name(index, key)).to(self.skeleton.dtype)
            for key, parameter in self.skeleton.blocks[index].named_parameters()
            if parameter.dim() > 1 and key not in stored
        }
        return _Frozen(codes, matrices)

    def _noted(self, name: str) -> Tensor:
        """A norm or bias as it is stored, in a type that it keeps."""
        found = self._source(name)
        self._stored[name] = found.dtype
        return found

    def _source(self, name: str) -> Tensor:
        return self.skeleton.source.read(name).to(self.skeleton.device)

    def _name(self, index: int, key: str) -> str:
        """What a block's parameter is called in the model."""
        return f"{self.skeleton.blocks_name}.{index}.{key}"

    # ---- the model as it is now

    def _weights(self, index: int) -> dict[str, Tensor]:
        block, dtype = self.blocks[index], self.skeleton.dtype
        frozen = block.frozen or self._read(index)
        weights = dict(frozen.matrices)
        for key, vector in block.vectors.items():
            weights[key] = store_through(vector, self._stored[self._name(index, key)]).to(dtype)
        for slot, q in frozen.codes.items():
            scale = scaled(q.scale, block.log_factors[slot])
            codes = split(q.codes.float(), scale.shape[1]) - q.zero.float().unsqueeze(-1)
            weight = scale.unsqueeze(-1) * codes
            if q.minimum is not None:
                weight = weight + scaled(q.minimum, block.log_factors[slot]).unsqueeze(-1)
            weights[slot.key] = slot.put(merge(weight).to(dtype))
        return weights

    def _normed(self, hidden: Tensor) -> Tensor:
        """What the student's vocabulary projection reads."""
        for name, module, vectors in zip(self.head.after_names, self.head.after, self.after, strict=True):
            own = {
                key: store_through(vector, self._stored[f"{name}.{key}"]).to(hidden.dtype)
                for key, vector in vectors.items()
            }
            hidden = functional_call(module, own, (hidden,))
        return hidden

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(role, parameter) of all that is learned, in a fixed order."""
        for block in self.blocks:
            for factor in block.log_factors.values():
                yield "scale", factor
            for vector in block.vectors.values():
                yield "vector", vector
        for vectors in self.after:
            for vector in vectors.values():
                yield "vector", vector

    # ---- the fit

    def run(self, stage: Stage, fresh: Iterator[Rows] | None = None, halfway: Halfway | None = None) -> Polished:
        """Learns, and keeps the iterate that is best on the held-out rows.

        With `fresh` rows, which come after those it has, no row is learned from twice, until held-out KL is flat.
        `stage` advances by one a step. `halfway` keeps how far it is.

        Errors: MachineError where a parameter stops being a number.
        """
        recipe = self.recipe
        calls = self.skeleton.calls(self.rows.ids.shape[1])
        data = self._pass(self.rows, calls, self.held_out)
        schedule = Schedule(
            steps=recipe.polish_steps,
            batch=self.ranks.count(recipe.polish_batch or recipe.batch),
            checks=recipe.checks,
            learning=recipe.polish_learning_of,
            seed=recipe.seed,
            until_flat=fresh is not None,
        )
        arriving = None if fresh is None else (self._pass(rows, calls) for rows in fresh)
        learnable, parameters = self._learnable(calls), list(self._parameters())
        tokens = torch.zeros((), dtype=torch.int64, device=self.skeleton.device)
        course = descend(
            parameters,
            lambda done: batches_of(data, schedule, arriving, tokens, done),
            lambda step, part: self._learn(part, learnable),
            (lambda: self._measure(data, calls)) if self.held_out else None,
            lambda: _refuse_not_a_number(parameters),
            schedule,
            stage,
            halfway=halfway,
        )
        (learned,) = map(int, self.ranks.total(int(tokens)))
        return Polished(*self._outcome(), course.losses, course.held_out, course.kept, learned, course.flat)

    @torch.no_grad()
    def _pass(self, rows: Rows, calls: list[Call], held_out: int = 0) -> Data:
        """Rows embedded, and through the full-precision model."""
        device, at_once = self.skeleton.device, self.skeleton.rows_at_once(self.recipe.batch, rows.ids.shape[1])
        inputs = self.skeleton.embed(rows.ids, batch=at_once, streams=self.streams)
        if self.teacher is self.skeleton:
            hidden = self.streams.copy(inputs)
        else:
            hidden = self.teacher.embed(rows.ids, batch=at_once, streams=self.streams)
        for block, call in enumerate(calls):
            self.teacher.advance(block, self.teacher.load_block(block), hidden, call, at_once)
        weights, following = rows.weights.to(device), rows.following.to(device)
        return Data(inputs, hidden, weights, following, len(rows) - held_out, held_out, self.ranks)

    def _learn(self, data: Data, learnable: LearnableBlocks) -> Tensor:
        """The loss of a step's rows; its gradient is left in the parameters."""
        top, weights = learnable(data.inputs).flatten(0, 1), data.weights.flatten()
        index = positions(data.weights)  # only now, when what a GPU is waited for is under way
        student = self._normed(top[index])
        with torch.no_grad():
            target = self.teacher_head.hidden(data.targets.flatten(0, 1)[index])
        loss = soft_cross_entropy(student, target, weights[index], self.head).cross_entropy
        loss = loss * self.ranks.part(weights.sum())
        loss.backward()
        return self.ranks.gathered(loss, [parameter for _, parameter in self._parameters()])

    def _learnable(self, calls: list[Call]) -> LearnableBlocks:
        def block_of(block: int, call: Call) -> LearnableBlock:
            own = self.blocks[block]
            return LearnableBlock(
                lambda entering: self.skeleton.run(block, self._weights(block), entering, call),
                [*own.log_factors.values(), *own.vectors.values()],
            )

        weights = sum(p.numel() for p in self.skeleton.blocks.parameters())
        return LearnableBlocks([block_of(*pair) for pair in enumerate(calls)], weights, self.resident)

    @torch.no_grad()
    def _measure(self, data: Data, calls: list[Call]) -> float:
        """Mean KL(teacher || student) of the held-out rows."""
        held = slice(len(data.inputs) - self.held_out, None)
        hidden, weights = data.entering(held).clone(), data.weights[held]
        for block, call in enumerate(calls):
            self.skeleton.advance(block, self._weights(block), hidden, call, self.recipe.batch)
        counted = weights > 0
        unused = torch.zeros(int(counted.sum()), dtype=torch.int64, device=hidden.device)
        student, target = self._normed(hidden[counted]), self.teacher_head.hidden(data.leaving(held)[counted])
        found = compare(student, self.head, target, self.teacher_head, unused)
        shares = weights[counted].double().cpu()
        total, count = self.ranks.total(float((found.kl * shares).sum()), float(shares.sum()))
        return total / count

    @torch.no_grad()
    def _outcome(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Scales, minima and vectors as they are stored."""
        scales: dict[str, Tensor] = {}
        minima: dict[str, Tensor] = {}
        vectors: dict[str, Tensor] = {}
        for index, block in enumerate(self.blocks):
            for slot, factor in block.log_factors.items():
                q = self.quantized(slot).to(factor.device)
                scales[slot.name] = scaled(q.scale, factor).to(q.grid.scale_dtype)
                if q.minimum is not None:
                    minima[slot.name] = scaled(q.minimum, factor).to(q.grid.scale_dtype)
            for key, vector in block.vectors.items():
                name = self._name(index, key)
                vectors[name] = vector.to(self._stored[name])
        for name, own in zip(self.head.after_names, self.after, strict=True):
            for key, vector in own.items():
                vectors[f"{name}.{key}"] = vector.to(self._stored[f"{name}.{key}"])
        return scales, minima, vectors


def _refuse_not_a_number(parameters: list[tuple[str, nn.Parameter]]) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for _, parameter in parameters):
        raise MachineError(
            "polish: a learned parameter is no longer a finite number",
            "the loss or its gradient overflowed",
            "finished blocks are kept: run again with a smaller rate (--recipe FILE, [polish_learning])",
        )


def scaled(x: Float[Tensor, "out groups"], log_factor: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """Scales or minima, multiplied by the exponential of what is learned and rounded to their stored type."""
    return store_through(x.float() * log_factor.exp(), x.dtype)
