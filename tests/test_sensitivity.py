"""What layers cost alone, against the whole model with that layer's weight replaced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model
from torch.nn.functional import cosine_similarity

from logitwise import sensitivity
from logitwise.calibration.rows import Rows
from logitwise.quantizers import STARTS
from logitwise.quantizers.rtn import RoundToNearest
from logitwise.recipe import Recipe
from logitwise.sensitivity import Sensitivity, Together
from logitwise.skeleton import Skeleton, Slot
from logitwise.watch import SILENT

CPU = torch.device("cpu")
ASKED = Recipe(target_bits=4.0, group_size=16)


def rows(count: int = 3) -> Rows:
    ids = torch.randint(3, VOCABULARY, (count, 13), generator=torch.Generator().manual_seed(5))
    weights = torch.ones(count, 12)
    weights[:, :4] = 0
    return Rows(ids[:, :-1], ids[:, 1:], weights)


def measured(
    recipe: Recipe = ASKED, family: str = "llama", kept: Callable[[Slot], bool] = lambda slot: False
) -> list[Together]:
    skeleton = Skeleton(MemorySource(tiny_model(family)), CPU, torch.float32)
    with SILENT.stage("", 1) as stage:
        return Sensitivity(skeleton, recipe, kept, rows()).of_layers(stage)


def names(one: Together) -> list[str]:
    return [slot.key.split(".")[-2] for slot in one.slots]


def test_layers_that_read_the_same_go_together() -> None:
    one_block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [names(one) for one in measured()] == 3 * one_block
    fused = [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    assert sorted(names(one) for one in measured(family="phi3")) == sorted(3 * fused)


def test_layers_that_are_kept_are_not_asked() -> None:
    found = measured(kept=lambda slot: "down" in slot.module or "k_proj" in slot.module)
    assert [names(one) for one in found] == 3 * [["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]]


def test_sizes_are_those_of_what_is_stored() -> None:
    for one in measured():
        for bits, stored in one.stored.items():
            codes = sum(slot.out_features * slot.in_features for slot in one.slots)
            assert stored == codes * bits + codes // 16 * 16  # symmetric: a scale of 16 bits for 16 weights


def kl(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """The mean over positions that count, in float64."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (teacher, student))
    weights = rows().weights.double()
    return float(((p.exp() * (p - q)).sum(-1) * weights).sum() / weights.sum())


@torch.no_grad()
def plain(slots: dict[Slot, int]) -> float:
    """KL of the whole model with these layers rounded to so many bits."""
    model, other = tiny_model("llama"), tiny_model("llama")
    for slot, bits in slots.items():
        module = other.get_submodule(slot.module)
        (grid,) = (grid for grid in ASKED.grids_of(slot.module) if grid.bits == bits)
        rounded = RoundToNearest.start(module.weight.data, grid, STARTS["searched"]).freeze()
        module.weight.data = rounded.dequantize()
    return kl(other(rows().ids).logits, model(rows().ids).logits)


@pytest.mark.parametrize("most_bytes", [sensitivity.MOST_BYTES, 1], ids=["one pass", "a pass a block"])
def test_loss_of_layers_is_the_divergence_with_them_alone_quantized(
    most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "MOST_BYTES", most_bytes)
    found = measured()
    assert len(found) == 12
    for one in found:
        assert set(one.loss) == set(ASKED.candidates)
        for bits, loss in one.loss.items():
            assert loss == pytest.approx(plain(dict.fromkeys(one.slots, bits)), rel=1e-3, abs=1e-7)


def test_as_many_blocks_go_together_as_there_is_room_for_their_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that read the same are one variant for each number of bits: four of a llama's block, not seven."""
    passes: list[range] = []
    by_kl = Sensitivity._by_kl

    def noting(self: Sensitivity, blocks: range, *given: Any) -> torch.Tensor:
        passes.append(blocks)
        return by_kl(self, blocks, *given)

    monkeypatch.setattr(Sensitivity, "_by_kl", noting)
    entering = rows().ids.numel() * 4 * tiny_model("llama").config.hidden_size
    for room, expected in ((3, [range(3)]), (2, [range(2), range(2, 3)])):
        passes.clear()
        monkeypatch.setattr(sensitivity, "MOST_BYTES", room * 4 * len(ASKED.candidates) * entering)
        measured()
        assert passes == expected


def test_divergence_of_the_whole_model() -> None:
    skeleton = Skeleton(MemorySource(tiny_model("llama")), CPU, torch.float32)
    judge = Sensitivity(skeleton, ASKED, lambda slot: False, rows())
    bits = {slot: 2 + (index % 3) for block in range(3) for index, slot in enumerate(skeleton.slots(block))}
    assert judge.of_model(bits) == pytest.approx(plain(bits), rel=1e-3)


def test_score_of_a_block_is_how_much_it_changes_what_it_reads() -> None:
    skeleton = Skeleton(MemorySource(tiny_model("llama")), CPU, torch.float32)
    hidden = skeleton.embed(rows().ids)
    found = iter(measured(ASKED.but(sensitivity="lim")))
    for block, call in enumerate(skeleton.calls(12)):
        left = skeleton.run(block, skeleton.load_block(block), hidden, call)
        worth = 1 - float(cosine_similarity(hidden, left, dim=-1).mean())
        for one in (next(found) for _ in range(4)):
            weights = sum(slot.out_features * slot.in_features for slot in one.slots)
            assert one.loss == pytest.approx({bits: worth * weights / 4**bits for bits in one.stored}, rel=1e-4)
        hidden = left


def test_score_of_a_block_is_the_share_of_its_weights_that_do_not_stand_out() -> None:
    model = tiny_model("llama")
    found = iter(measured(ASKED.but(sensitivity="zd")))
    for block in model.model.layers:
        matrices = [p for p in block.parameters() if p.dim() == 2]
        out = sum(int(((w - w.mean()) / w.std() > 1).sum()) for w in matrices)
        worth = 1 - out / sum(w.numel() for w in matrices)
        for one in (next(found) for _ in range(4)):
            weights = sum(slot.out_features * slot.in_features for slot in one.slots)
            assert one.loss == pytest.approx({bits: worth * weights / 4**bits for bits in one.stored}, rel=1e-6)
