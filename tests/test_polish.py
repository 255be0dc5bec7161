"""The polish: gradients of the whole model though one block is in memory, scales alone, the best iterate, its file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model
from torch import nn
from transformers import PreTrainedModel

from logitwise.calibration.rows import Rows
from logitwise.descent import is_flat
from logitwise.errors import MachineError
from logitwise.grid import Grid, Quantized, merge, split
from logitwise.objectives import reference
from logitwise.polish import Polish, Polished
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton, Slot
from logitwise.watch import Stage

HELD_OUT = 4
FLOAT32 = Grid(3, 16, False, torch.float32)


def rows() -> Rows:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (12, 14), generator=generator)
    return Rows(ids[:, :-1], ids[:, 1:], (torch.rand(12, 13, generator=generator) > 0.3).float())


def opened(
    model: str | PreTrainedModel, grid: Grid = FLOAT32, **changes: object
) -> tuple[Polish, dict[str, Quantized]]:
    """A tiny model rounded to nearest, about to be polished; its feed-forward outputs are kept."""
    skeleton = Skeleton(
        MemorySource(tiny_model(model) if isinstance(model, str) else model), torch.device("cpu"), torch.float32
    )
    codes: dict[str, Quantized] = {}

    def quantized(slot: Slot) -> Quantized:
        if slot.name not in codes:
            weight = slot.get(skeleton.load_block(slot.block))
            codes[slot.name] = QUANTIZERS["rtn"].start(weight, grid, STARTS["minmax"]).freeze()
        return codes[slot.name]

    def kept(slot: Slot) -> bool:
        return slot.name.endswith(("o_proj.weight", "out_proj.weight"))

    settings = {"polish_steps": 6, "batch": 4, "checks": 3, **changes}
    return Polish(skeleton, Recipe.load(None, **settings), rows(), HELD_OUT, quantized, kept), codes


def norms(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() == 1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen2"])
def test_gradients_are_those_of_the_models_own_forward(family: str) -> None:
    """Scales, norms and biases, final norm included, against autograd through transformers' model at once."""
    polish, codes = opened(family)
    data = rows()
    calls = polish.skeleton.calls(data.ids.shape[1])
    loss = polish._learn(polish._pass(data, calls), polish._learnable(calls))

    model, original = tiny_model(family), tiny_model(family)
    factors, replaced = {}, {}
    for name, q in codes.items():
        factors[name] = torch.ones_like(q.scale).requires_grad_()
        difference = split(q.codes.float(), q.scale.shape[1]) - q.zero.float().unsqueeze(-1)
        replaced[name] = merge((q.scale * factors[name]).unsqueeze(-1) * difference)
    vectors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.dim() == 1}
    embedding = [name for name in vectors if "embed" in name]
    z = torch.func.functional_call(model, {**replaced, **vectors}, kwargs={"input_ids": data.ids}).logits
    with torch.no_grad():
        t = original(input_ids=data.ids).logits
    counted = data.weights > 0
    expected = reference.soft_cross_entropy(z[counted], t[counted], data.weights[counted])
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for index, block in enumerate(polish.blocks):
        for slot, factor in block.log_factors.items():  # d/d log f = d/df at f = 1
            assert torch.allclose(factor.grad, factors[slot.name].grad, rtol=2e-3, atol=2e-6), slot.name
        for key, vector in block.vectors.items():
            name = f"{polish.skeleton.blocks_name}.{index}.{key}"
            assert torch.allclose(vector.grad, vectors.pop(name).grad, rtol=2e-3, atol=2e-6), name
    for name, own in zip(polish.head.after_names, polish.after, strict=True):
        for key, vector in own.items():
            assert torch.allclose(vector.grad, vectors.pop(f"{name}.{key}").grad, rtol=2e-3, atol=2e-6), name
    assert set(vectors) <= set(embedding)  # every vector after the embedding was tuned


def test_the_held_out_divergence_falls_and_the_best_iterate_is_kept() -> None:
    polish, codes = opened("llama", polish_steps=30)
    found = polish.run(Stage())
    measures = dict(found.held_out)
    assert list(measures) == [0, 10, 20, 30]
    assert len(found.losses) == 30
    assert measures[found.kept] == min(measures.values()) < 0.95 * measures[0]
    assert set(found.scales) == set(codes)
    assert all(found.scales[name].dtype == torch.float32 for name in codes)
    assert any(not torch.equal(found.scales[name], q.scale) for name, q in codes.items())


def test_what_is_stored_is_what_was_measured() -> None:
    """The outcome put into transformers' own model has the held-out KL that chose it, each tensor in its own type."""
    original, data = tiny_model("llama"), rows()[12 - HELD_OUT :]
    types = {name: torch.float32 if "layers.0" in name else torch.bfloat16 for name, p in norms(original)}
    for name, norm in norms(original):
        norm.data = norm.data.to(types[name])
    polish, codes = opened(original, Grid(3, 16, False, torch.float16), polish_steps=12)
    found = polish.run(Stage())
    original, model = original.float(), tiny_model("llama")
    weights = {name: Quantized(q.codes, found.scales[name], q.zero, q.grid).dequantize() for name, q in codes.items()}
    assert {scale.dtype for scale in found.scales.values()} == {torch.float16}
    assert {name: vector.dtype for name, vector in found.vectors.items()} == types
    vectors = {name: vector.float() for name, vector in found.vectors.items()}
    with torch.no_grad():
        z = torch.func.functional_call(model, {**weights, **vectors}, kwargs={"input_ids": data.ids}).logits
        t = original(input_ids=data.ids).logits
    counted = data.weights > 0
    kl = reference.divergence(z[counted].double(), t[counted].double()).mean()
    assert dict(found.held_out)[found.kept] == pytest.approx(float(kl), rel=1e-4)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second, other = (opened("llama", seed=seed)[0].run(Stage()) for seed in (0, 0, 1))
    assert first.losses == second.losses != other.losses
    assert all(torch.equal(first.scales[name], second.scales[name]) for name in first.scales)


def test_a_rate_that_is_too_large_leaves_the_model_as_it_came() -> None:
    wild = {role: {"optimizer": "adam", "rate": 3.0, "schedule": "cosine"} for role in ("scale", "vector")}
    polish, codes = opened("llama", polish_learning=wild)
    found = polish.run(Stage())
    assert found.kept == 0
    assert all(torch.equal(found.scales[name], q.scale) for name, q in codes.items())


def test_a_parameter_that_is_no_number_stops_the_polish() -> None:
    polish, _ = opened("llama")
    with torch.no_grad():
        next(iter(polish.blocks[0].log_factors.values())).fill_(torch.nan)
    with pytest.raises(MachineError, match="no longer a finite number"):
        polish.run(Stage())


def test_fresh_rows_come_after_those_there_are_until_the_held_out_curve_is_flat() -> None:
    quick = {role: {"optimizer": "adam", "rate": 8e-3, "schedule": "cosine"} for role in ("scale", "vector")}
    polish, _ = opened("llama", polish_steps=200, checks=40, batch=2, polish_learning=quick)
    given: list[Rows] = []

    def fresh() -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(9)
        while True:
            ids = torch.randint(VOCABULARY, (6, 14), generator=generator)
            given.append(Rows(ids[:, :-1], ids[:, 1:], torch.ones(6, 13)))
            yield given[-1]

    found = polish.run(Stage(), fresh())
    values = [value for _, value in found.held_out]
    assert found.flat is not None
    assert found.flat % 5 == 0
    steps = len(found.losses)
    assert steps == found.flat + max(1, found.flat // 4) < 200  # rates fall in a quarter of the steps before
    assert found.held_out[-1][0] == steps
    at = [step for step, _ in found.held_out].index(found.flat)
    assert is_flat(values[: at + 1])
    assert not any(is_flat(values[: end + 1]) for end in range(at))
    # 8 rows there were, then 6 at a time, 2 a step.
    assert len(given) == -(-(2 * steps - 8) // 6)
    assert found.tokens == int((rows().weights[:8] > 0).sum()) + (2 * steps - 8) * 13
    assert dict(found.held_out)[found.kept] == min(values) < 0.95 * values[0]


def test_flat_is_less_than_a_hundredth_in_two_values() -> None:
    assert not is_flat([1.0, 0.995])
    assert is_flat([1.0, 0.995, 0.9925])
    assert not is_flat([1.0, 0.995, 0.98])
    assert not is_flat([0.5, 0.9, 0.8])  # it rose, and falls: a high rate does so
    assert not is_flat([0.25, 0.272, 0.255, 0.245])
    assert is_flat([0.5, 0.9, 0.895, 0.893])
    assert not is_flat([0.5, 0.6, 0.7])


def test_a_polish_is_kept_in_the_run_folder(tmp_path: Path) -> None:
    polished = Polished(
        {"a": torch.ones(2, 1).half()},
        {"a": torch.ones(2, 1)},
        {"b": torch.zeros(3)},
        [1.0, 0.5],
        [(0, 0.3), (2, 0.2)],
        2,
        9,
        None,
    )
    folder = RunFolder(tmp_path / "run")
    folder.save_polished("key", polished)
    again = folder.load_polished("key")
    assert folder.has("key")
    assert again.held_out == [(0, 0.3), (2, 0.2)]
    assert again.kept == 2
    assert torch.equal(again.scales["a"], polished.scales["a"])
    assert torch.equal(again.minima["a"], polished.minima["a"])
    assert torch.equal(again.vectors["b"], polished.vectors["b"])
