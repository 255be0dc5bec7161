"""What quantizing layers costs a model's token probabilities: each alone, or all of them.

Layers that read the same hidden states (q, k and v; gate and up) are fused by engines: they go together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from logitwise.calibration.rows import Rows
from logitwise.grid import Grid
from logitwise.head import Head
from logitwise.objectives.soft import compare
from logitwise.quantizers import STARTS
from logitwise.quantizers.rtn import RoundToNearest
from logitwise.recipe import Recipe
from logitwise.skeleton import Skeleton, Slot
from logitwise.watch import Stage

MOST_BYTES = 1 << 31
"""Hidden states of layers that are measured at once; for more the model is passed through again."""


@dataclass(frozen=True)
class Together:
    """Layers that have the same bits.

    Args:
        slots: they.
        stored: by bits, how many bits they take, scales and zero points included.
        loss: by bits, what quantizing them alone costs: KL in nats a token, or a score that stands for it.
    """

    slots: tuple[Slot, ...]
    stored: dict[int, int]
    loss: dict[int, float]


class Sensitivity:
    """A model on some rows, layers of which are rounded to nearest where a fit would start.

    Args:
        skeleton: the model.
        recipe: whose grids layers may come to have.
        kept: slots that stay in full precision.
        rows: what it is measured on.
        bits_stored: bits that a weight on a grid takes, of its outputs and inputs.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        kept: Callable[[Slot], bool],
        rows: Rows,
        bits_stored: Callable[[Grid, int, int], int] = Grid.bits_stored,
    ) -> None:
        self.skeleton, self.recipe, self.kept, self.rows = skeleton, recipe, kept, rows
        self.bits_stored = bits_stored
        self.calls = skeleton.calls(rows.ids.shape[1])
        self.at_once = skeleton.rows_at_once(recipe.batch, rows.ids.shape[1])

    # ---- of layers alone

    @torch.no_grad()
    def of_layers(self, stage: Stage) -> list[Together]:
        """All layers with what their bits cost, by `recipe.sensitivity`; `stage` advances by one a block.

        `kl`: KL to full precision with these layers alone quantized. `lim` and `zd`: what a block is worth times
        4^-bits, as squared errors fall, and its share of the weights. That is, for `lim`, how much the block changes
        what it reads, 1 - cos(input, output), and for `zd` the share of its weights that lie at most one deviation
        above their mean (scores of Layer-Wise Quantization, arXiv 2406.17415, which ranks blocks by them; that they
        are made losses of layers is ours).
        """
        entering = self.skeleton.embed(self.rows.ids, batch=self.at_once)
        depth, by_kl = len(self.skeleton), self.recipe.sensitivity == "kl"
        at_once = depth
        if by_kl:
            together = self._together(0, self.skeleton.load_block(0), entering)
            variants = len(self.recipe.candidates) * max(1, len(together))
            at_once = max(1, MOST_BYTES // (entering.nbytes * variants))
        found: list[Together] = []
        for first in range(0, depth, at_once):
            blocks = range(first, min(first + at_once, depth))
            entering = self._by_kl(blocks, entering, found, stage) if by_kl else self._by_score(entering, found, stage)
        return found

    def _by_kl(self, blocks: range, entering: Tensor, found: list[Together], stage: Stage) -> Tensor:
        """The layers of some blocks, which `entering` enters, are added to those found; returns what leaves them."""
        hidden, leaving = entering.clone(), entering
        variants: list[tuple[Together, int, Tensor]] = []
        for block in range(blocks[0], len(self.skeleton)):
            weights = self.skeleton.load_block(block)
            for *_, variant in variants:
                self._advance(block, weights, variant)
            if block in blocks:
                exact = self.skeleton.load_block(block, dtype=torch.float32)
                for one in self._together(block, weights, hidden):
                    found.append(one)
                    for bits in one.stored:
                        variants.append((one, bits, hidden.clone()))
                        rounded = self._rounded(exact, dict.fromkeys(one.slots, bits))
                        self._advance(block, weights | rounded, variants[-1][-1])
                stage.advance()
            self._advance(block, weights, hidden)
            if block == blocks[-1]:
                leaving = hidden.clone()
        head = self.skeleton.head()
        for one, bits, variant in variants:
            one.loss[bits] = self._kl(variant, hidden, head)
        return leaving

    def _by_score(self, hidden: Tensor, found: list[Together], stage: Stage) -> Tensor:
        for block in range(len(self.skeleton)):
            weights, before = self.skeleton.load_block(block), hidden.clone()
            groups = self._together(block, weights, hidden)
            self._advance(block, weights, hidden)
            matrices = [slot.get(weights).float() for one in groups for slot in one.slots]
            if self.recipe.sensitivity == "even":
                worth = 1.0
            elif self.recipe.sensitivity == "lim":
                worth = 1 - float(cosine_similarity(before.float(), hidden.float(), dim=-1).mean())
            else:
                outside = sum(int((w > w.mean() + w.std()).sum()) for w in matrices)
                worth = 1 - outside / max(1, sum(w.numel() for w in matrices))
            for one in groups:
                share = sum(slot.out_features * slot.in_features for slot in one.slots)
                one.loss.update({bits: worth * share * 4.0**-bits for bits in one.stored})
            found += groups
            stage.advance()
        return hidden

    def _together(self, block: int, weights: dict[str, Tensor], hidden: Tensor) -> list[Together]:
        """The layers of a block that are quantized, those that read the same hidden states together."""
        _, seen = self.skeleton.run_seen(block, weights, hidden[:1], self.calls[block])
        by_input: dict[int, list[Slot]] = {}
        for slot in self.skeleton.slots(block):
            if not self.kept(slot):
                by_input.setdefault(id(seen[slot.key]), []).append(slot)
        found = []
        for slots in by_input.values():
            stored = dict.fromkeys(self.recipe.candidates, 0)
            for slot in slots:
                for grid in self.recipe.grids_of(slot.module):
                    stored[grid.bits] += self.bits_stored(grid, slot.out_features, slot.in_features)
            found.append(Together(tuple(slots), stored, {}))
        return found

    # ---- of the whole model

    @torch.no_grad()
    def of_model(self, bits: dict[Slot, int]) -> float:
        """KL to full precision, nats a token, with each layer at the bits given."""
        teacher = self.skeleton.embed(self.rows.ids, batch=self.at_once)
        student = teacher.clone()
        for block in range(len(self.skeleton)):
            weights, exact = self.skeleton.load_block(block), self.skeleton.load_block(block, dtype=torch.float32)
            self._advance(block, weights, teacher)
            own = {slot: count for slot, count in bits.items() if slot.block == block}
            self._advance(block, weights | self._rounded(exact, own), student)
        return self._kl(student, teacher, self.skeleton.head())

    # ---- both

    def _advance(self, block: int, weights: dict[str, Tensor], hidden: Tensor) -> None:
        self.skeleton.advance(block, weights, hidden, self.calls[block], self.at_once)

    def _rounded(self, exact: dict[str, Tensor], bits: dict[Slot, int]) -> dict[str, Tensor]:
        """The parameters of a block that hold these slots, rounded to so many bits each."""
        start = STARTS.get(self.recipe.start, STARTS["searched"])
        found = {}
        for slot, count in bits.items():
            (grid,) = (grid for grid in self.recipe.grids_of(slot.module) if grid.bits == count)
            rounded = RoundToNearest.start(slot.get(exact).contiguous(), grid, start).freeze().dequantize()
            found[slot.key] = slot.put(rounded.to(self.skeleton.dtype))
        return found

    def _kl(
        self, student: Float[Tensor, "rows tokens d"], teacher: Float[Tensor, "rows tokens d"], head: Head
    ) -> float:
        counted = self.rows.weights > 0
        weights, where = self.rows.weights[counted].double(), counted.to(student.device)
        own, others = head.hidden(student[where]), head.hidden(teacher[where])
        kl = compare(own, head, others, head, self.rows.following[counted].to(student.device)).kl
        return float((kl * weights).sum() / weights.sum())
