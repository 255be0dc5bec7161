"""Polish: every scale of the model tuned together under the soft cross-entropy, codes and zero points frozen.

Blocks are fitted one after another, each blind to those after it; what they leave is tuned here, end to end, in what
costs nothing at inference: the scales of all groups, and the vectors that stay in full precision (norms, biases).
EfficientQAT tunes scales so (E2E-QP, arXiv 2407.11062), with the text's next token as a hard label; here the label is
the full-precision model's distribution. The forward pass goes block by block and keeps what enters each; going backward
each block is run once more, so that no more than one is in memory with its activations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from logitwise.calibration.rows import Rows
from logitwise.errors import MachineError
from logitwise.fit import rate_at, row_order
from logitwise.grid import Quantized, merge, split, store_through
from logitwise.objectives.soft import compare, soft_cross_entropy
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
        vectors: norms and biases by name, in the type the source keeps them in.
        losses: the training loss of every step.
        held_out: (step, held-out KL), in order; step 0 is the model as it came.
        kept: the step whose iterate was kept.
    """

    scales: dict[str, Tensor]
    vectors: dict[str, Tensor]
    losses: list[float]
    held_out: list[tuple[int, float]]
    kept: int


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
        skeleton: the model.
        recipe: how.
        rows: the rows to learn from, then those held out; `held_out` of the latter.
        quantized: what is stored for a slot.
        kept: slots that stay in full precision.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        rows: Rows,
        held_out: int,
        quantized: Callable[[Slot], Quantized],
        kept: Callable[[Slot], bool],
    ) -> None:
        self.skeleton, self.recipe, self.held_out, self.rows = skeleton, recipe, held_out, rows
        self.quantized, self.kept = quantized, kept
        self.stored = skeleton.source.dtype
        self.resident = self._fits()
        self.blocks = [self._open(block) for block in range(len(skeleton))]
        self.head = skeleton.head()
        # Copies: the teacher goes on through the head as it is.
        self.after = [
            {key: nn.Parameter(p.float().clone()) for key, p in module.named_parameters() if p.dim() == 1}
            for module in self.head.after
        ]

    def _fits(self) -> bool:
        """Whether every block's codes may stay on the device; on a CPU they stay on disk, which it keeps in mind."""
        if self.skeleton.device.type != "cuda":
            return False
        bytes_of_codes = sum(p.numel() for p in self.skeleton.blocks.parameters())
        free, _ = torch.cuda.mem_get_info(self.skeleton.device)
        return bytes_of_codes < free // 2

    def _open(self, index: int) -> _Block:
        frozen = self._read(index)
        factors = {
            slot: nn.Parameter(torch.zeros_like(q.scale, dtype=torch.float32)) for slot, q in frozen.codes.items()
        }
        vectors = {
            key: nn.Parameter(self._source(index, key).float())
            for key, parameter in self.skeleton.blocks[index].named_parameters()
            if parameter.dim() == 1
        }
        return _Block(factors, vectors, frozen if self.resident else None)

    def _read(self, index: int) -> _Frozen:
        codes = {s: self.quantized(s).to(self.skeleton.device) for s in self.skeleton.slots(index) if not self.kept(s)}
        stored = {slot.key for slot in codes}
        matrices = {
            key: self._source(index, key).to(self.skeleton.dtype)
            for key, parameter in self.skeleton.blocks[index].named_parameters()
            if parameter.dim() > 1 and key not in stored
        }
        return _Frozen(codes, matrices)

    def _source(self, index: int, key: str) -> Tensor:
        return self.skeleton.source.read(f"{self.skeleton.blocks_name}.{index}.{key}").to(self.skeleton.device)

    # ---- the model as it is now

    def _weights(self, index: int) -> dict[str, Tensor]:
        block, dtype = self.blocks[index], self.skeleton.dtype
        frozen = block.frozen or self._read(index)
        weights = dict(frozen.matrices)
        for key, vector in block.vectors.items():
            weights[key] = store_through(vector, self.stored).to(dtype)
        for slot, q in frozen.codes.items():
            scale = scale_of(q, block.log_factors[slot])
            codes = split(q.codes.float(), scale.shape[1]) - q.zero.float().unsqueeze(-1)
            weights[slot.key] = slot.put(merge(scale.unsqueeze(-1) * codes).to(dtype))
        return weights

    def _normed(self, hidden: Tensor) -> Tensor:
        """What the student's vocabulary projection reads."""
        for module, vectors in zip(self.head.after, self.after, strict=True):
            own = {key: store_through(vector, self.stored).to(hidden.dtype) for key, vector in vectors.items()}
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

    def run(self, stage: Stage) -> Polished:
        """Learns, and keeps the iterate that is best on the held-out rows.

        `stage` advances by one a step.

        Errors: MachineError where a parameter stops being a number.
        """
        recipe, skeleton = self.recipe, self.skeleton
        calls = skeleton.calls(self.rows.ids.shape[1])
        inputs = skeleton.embed(self.rows.ids, batch=recipe.batch)
        teacher = self._teach(inputs, calls)
        device = inputs.device
        weights = self.rows.weights.to(device)
        train = len(self.rows) - self.held_out
        parameters = list(self._parameters())
        learnings = {role: recipe.polish_learning_of(role) for role, _ in parameters}
        optimizers = {role: torch.optim.Adam([p for r, p in parameters if r == role], fused=True) for role in learnings}
        order = row_order(train, recipe.polish_batch or recipe.batch, recipe.seed)
        steps = recipe.polish_steps
        checks = {round(steps * (i + 1) / recipe.checks) for i in range(recipe.checks)} | {0}
        losses: list[Tensor] = []
        held_out: list[tuple[int, float]] = []
        best: list[Tensor] | None = None
        kept = steps
        for step in range(steps + 1):
            if step in checks:
                _refuse_not_a_number(parameters)
            if self.held_out and step in checks:
                value = self._measure(inputs[train:], teacher[train:], weights[train:], calls)
                if best is None or value < min(v for _, v in held_out):
                    kept, best = step, [parameter.detach().clone() for _, parameter in parameters]
                held_out.append((step, value))
            if step == steps:
                break
            rows = next(order).to(device)
            losses.append(self._learn(inputs[rows], teacher[rows], weights[rows], calls))
            for role, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(learnings[role], step, steps)
                optimizer.step()
                optimizer.zero_grad()
            stage.advance()
        if best is not None:
            with torch.no_grad():
                for (_, parameter), value_kept in zip(parameters, best, strict=True):
                    parameter.copy_(value_kept)
        return self._outcome(torch.stack(losses).tolist() if losses else [], held_out, kept)

    @torch.no_grad()
    def _teach(self, inputs: Tensor, calls: list[Call]) -> Tensor:
        """The full-precision model's last hidden states on every row."""
        hidden = inputs.clone()
        for block, call in enumerate(calls):
            weights = self.skeleton.load_block(block)
            for start in range(0, len(hidden), self.recipe.batch):
                part = slice(start, start + self.recipe.batch)
                hidden[part] = self.skeleton.run(block, weights, hidden[part], call)
        return hidden

    def _learn(self, inputs: Tensor, teacher: Tensor, weights: Tensor, calls: list[Call]) -> Tensor:
        """The loss of a batch; its gradient is left in the parameters."""
        entering = [inputs]
        with torch.no_grad():
            for block, call in enumerate(calls):
                entering.append(self.skeleton.run(block, self._weights(block), entering[-1], call))
        top = entering.pop().requires_grad_()
        counted = weights > 0
        with torch.no_grad():
            target = self.head.hidden(teacher[counted])
        loss = soft_cross_entropy(self._normed(top[counted]), target, weights[counted], self.head).cross_entropy
        loss.backward()
        gradient = top.grad
        for block in reversed(range(len(calls))):
            bottom = entering.pop().detach().requires_grad_()
            self.skeleton.run(block, self._weights(block), bottom, calls[block]).backward(gradient)
            gradient = bottom.grad
        return loss.detach()

    @torch.no_grad()
    def _measure(self, inputs: Tensor, teacher: Tensor, weights: Tensor, calls: list[Call]) -> float:
        """Mean KL(teacher || student) of the held-out rows."""
        hidden = inputs.clone()
        for block, call in enumerate(calls):
            own = self._weights(block)
            for start in range(0, len(hidden), self.recipe.batch):
                part = slice(start, start + self.recipe.batch)
                hidden[part] = self.skeleton.run(block, own, hidden[part], call)
        counted = weights > 0
        unused = torch.zeros(int(counted.sum()), dtype=torch.int64, device=hidden.device)
        student, target = self._normed(hidden[counted]), self.head.hidden(teacher[counted])
        found = compare(student, self.head, target, self.head, unused)
        shares = weights[counted].double().cpu()
        return float((found.kl * shares).sum() / shares.sum())

    @torch.no_grad()
    def _outcome(self, losses: list[float], held_out: list[tuple[int, float]], kept: int) -> Polished:
        scales, vectors = {}, {}
        for index, block in enumerate(self.blocks):
            for slot, factor in block.log_factors.items():
                q = self.quantized(slot).to(factor.device)
                scales[slot.name] = scale_of(q, factor).to(q.grid.scale_dtype)
            for key, vector in block.vectors.items():
                vectors[f"{self.skeleton.blocks_name}.{index}.{key}"] = vector.to(self.stored)
        for name, own in zip(self.head.after_names, self.after, strict=True):
            for key, vector in own.items():
                vectors[f"{name}.{key}"] = vector.to(self.stored)
        return Polished(scales, vectors, losses, held_out, kept)


def _refuse_not_a_number(parameters: list[tuple[str, nn.Parameter]]) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for _, parameter in parameters):
        raise MachineError(
            "polish: a learned parameter is no longer a finite number",
            "the loss or its gradient overflowed",
            "finished windows are kept: run again with a smaller rate (--recipe FILE, [polish_learning])",
        )


def scale_of(q: Quantized, log_factor: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """A slot's scale, multiplied by the exponential of what is learned and rounded to its stored type."""
    return store_through(q.scale.float() * log_factor.exp(), q.grid.scale_dtype)
