"""Blocks with learned weights, one after another, to go backward through.

Where their activations do not fit beside each other, only one block is in memory with its activations: each is run
once more when its gradient's turn comes. A small model's step is bound by launches and not by arithmetic: on a GPU its
blocks are recorded as CUDA graphs, forward and backward, and replayed; their gradients lie in the recording's memory
and are to be used, and set to None, before the next step, where they are not added to what the parameters have already.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.attention import warn_strictly
from logitwise.memory import free_memory
from logitwise.recording import recording

RECORDED_WEIGHTS = 1 << 27
"""Weights of all blocks together up to which launches cost more than arithmetic."""

BYTES_A_WEIGHT = 36
"""What a learned weight takes: saved for the backward pass 18, its gradient 4, the optimiser 8, the best iterate 4."""

ACTIVATIONS = 40
"""What a block keeps for its backward pass, in hidden states: a bound for gated MLPs four times as wide."""


class LearnableBlock(nn.Module):
    """One block as a function of the hidden states that enter it.

    Args:
        run: from hidden states to hidden states; it reads the parameters of `learned` and nothing else that changes.
        learned: the modules or parameters that are learned.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], learned: Sequence[nn.Module | nn.Parameter]) -> None:
        super().__init__()
        self.run = run
        self.learned = nn.ModuleList(part for part in learned if isinstance(part, nn.Module))
        self.alone = nn.ParameterList(part for part in learned if isinstance(part, nn.Parameter))

    def forward(self, hidden: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens leaving"]:
        """The hidden states that leave it."""
        return self.run(hidden)


class _RunAgain(torch.autograd.Function):
    """A block that keeps nothing but what entered it, and is run once more going backward."""

    @staticmethod
    def forward(ctx: Any, block: LearnableBlock, hidden: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.block, ctx.learns_hidden = block, hidden.requires_grad
        ctx.save_for_backward(hidden)
        left: Tensor = block(hidden)
        return left

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.learns_hidden)
        with torch.enable_grad():
            out = ctx.block(hidden)
        wanted = [*([hidden] if ctx.learns_hidden else []), *ctx.block.parameters()]
        found = torch.autograd.grad(out, wanted, gradient, allow_unused=True)
        return (None, *found) if ctx.learns_hidden else (None, None, *found)


class LearnableBlocks:
    """Consecutive learned blocks.

    Args:
        blocks: in order.
        weights: how many weights they have together.
        may_record: whether nothing but their parameters changes from step to step.
    """

    def __init__(self, blocks: Sequence[LearnableBlock], weights: int, may_record: bool = True) -> None:
        self.blocks, self.weights, self.may_record = list(blocks), weights, may_record
        self._recorded: tuple[Callable[..., Tensor], ...] = ()
        self._shape: torch.Size | None = None
        self._fit = False

    def __call__(self, hidden: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens leaving"]:
        """The last block's output."""
        if self._shape is None:
            self._shape, self._fit = hidden.shape, self._fits(hidden)
            if self._fit and self.may_record and self._is_worth_recording(hidden):
                self._record(hidden)
        as_first = hidden.shape == self._shape
        if self._recorded and as_first:
            for block in self._recorded:
                hidden = block(hidden)
        elif len(self.blocks) == 1 or (self._fit and as_first):
            for block in self.blocks:
                hidden = block(hidden)
        else:
            for block in self.blocks:
                hidden = _RunAgain.apply(block, hidden, *block.parameters())  # type: ignore[no-untyped-call]
        return hidden

    def _is_worth_recording(self, hidden: Tensor) -> bool:
        learned = all(any(parameter.requires_grad for parameter in block.parameters()) for block in self.blocks)
        return hidden.is_cuda and learned and self.weights <= RECORDED_WEIGHTS

    def _fits(self, hidden: Tensor) -> bool:
        """Whether all blocks may be in memory with their activations at once, and half of what is free be left."""
        needed = ACTIVATIONS * len(self.blocks) * hidden.nbytes + BYTES_A_WEIGHT * self.weights
        return needed < free_memory(hidden.device) // 2

    def _record(self, hidden: Tensor) -> None:
        # Copies, because recording changes a module's forward; the blocks themselves take hidden states of any shape.
        copies = tuple(LearnableBlock(block.run, [*block.learned, *block.alone]) for block in self.blocks)
        samples = []
        for index in range(len(copies)):
            sample = torch.zeros_like(hidden, requires_grad=index > 0 or hidden.requires_grad)
            samples.append((sample,))
        # PyTorch 2.10 and later warn that gradients are added up on the stream of the recording; they are waited for.
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            gc.collect()  # graphs of before hold themselves in cycles; they are not to go while these are recorded
            with recording(hidden.device):
                made = torch.cuda.make_graphed_callables(copies, tuple(samples), allow_unused_input=True)
            self._recorded = cast(tuple[Callable[..., Tensor], ...], made)
        except RuntimeError:  # no memory, or a forward that waits for the GPU: the blocks are run instead
            warn_strictly(not warn_only)
            torch.cuda.empty_cache()
