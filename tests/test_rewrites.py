"""A rewritten model computes what it did; its scales are those of the published formulas."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model
from source_files import llama_config, random_model, save
from test_pipeline import TINY, Listener, dense_logits, logits_of, prose
from torch import Tensor
from transformers import Starcoder2Config

import logitwise
from logitwise import pipeline
from logitwise.errors import RecipeError, SourceError
from logitwise.grid import Grid
from logitwise.quantizers.starts import STARTS, minmax
from logitwise.recipe import Recipe
from logitwise.rewrites import find_folds, prove_same, rewrite
from logitwise.rewrites.folds import Fold
from logitwise.rewrites.scales import RATIOS, ROUNDS, SCALES, Chosen, Inputs, Problem, awq, dual_scale
from logitwise.rewrites.walk import _rounded
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton, Slot, load_whole
from logitwise.source import open_source
from logitwise.source.rewritten import Changes, Rewritten
from logitwise.watch import Stage

CPU = torch.device("cpu")
RECIPE = Recipe.load(None, bits=2, group_size=16, scale_dtype="float32", rewrites=["awq", "dual_scale"], batch=4)
ATTENTION, MLP, DOWN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)
FOLDS: dict[str, dict[tuple[str, int], tuple[str, ...]]] = {
    "llama": {("input_layernorm", 0): ATTENTION, ("post_attention_layernorm", 0): MLP, ("up_proj", 0): DOWN},
    "gemma2": {("input_layernorm", 0): ATTENTION, ("pre_feedforward_layernorm", 0): MLP, ("up_proj", 0): DOWN},
    "cohere": {("input_layernorm", 0): ATTENTION + MLP, ("up_proj", 0): DOWN},
    "olmo2": {("up_proj", 0): DOWN},
    "phi3": {
        ("input_layernorm", 0): ("qkv_proj",),
        ("post_attention_layernorm", 0): ("gate_up_proj",),
        ("gate_up_proj", 80): DOWN,
    },
    "gpt-neox": {("input_layernorm", 0): ("query_key_value",), ("post_attention_layernorm", 0): ("dense_h_to_4h",)},
    "opt": {
        ("self_attn_layer_norm", 0): ("k_proj", "q_proj", "v_proj"),
        ("final_layer_norm", 0): ("fc1",),
        ("v_proj", 0): ("out_proj",),
        ("fc1", 0): ("fc2",),
    },
    "gpt2": {("ln_1", 0): ("c_attn",), ("ln_2", 0): ("c_fc",), ("c_attn", 96): ("c_proj",)},
}


def last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def skeleton_of(family: str, dtype: torch.dtype = torch.float32) -> Skeleton:
    """A tiny model stored in `dtype`, computed in float32."""
    source = MemorySource(tiny_model(family))
    source.dtype, source.state = dtype, {name: tensor.to(dtype) for name, tensor in source.state.items()}
    return Skeleton(source, CPU, torch.float32)


def random_ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(source: Any, ids: Tensor) -> Tensor:
    """Of the whole model in float32, by its own forward."""
    return load_whole(source, CPU, torch.float32)(input_ids=ids).logits


# ---- folds


@pytest.mark.parametrize("family", FOLDS)
def test_folds_are_found_in_every_block_without_names(family: str) -> None:
    folds = find_folds(skeleton_of(family), Stage())
    for block in range(3):
        own = [fold for fold in folds if fold.block == block]
        found = {(last(f.producer), f.first): tuple(sorted(last(r.key) for r in f.readers)) for f in own}
        assert found == {producer: tuple(sorted(readers)) for producer, readers in FOLDS[family].items()}
        assert len(own) == len(found)
    gemma = [fold.offset for fold in folds if fold.rows is None]
    assert gemma == [1.0 if family == "gemma2" else 0.0] * len(gemma)


@pytest.mark.parametrize("also", [0.0, 1e-6])
def test_a_norm_that_is_read_by_more_than_slots_is_no_fold_however_little_that_is(also: float) -> None:
    skeleton = skeleton_of("llama")
    source = skeleton.source
    assert isinstance(source, MemorySource)
    source.state["model.layers.1.mlp.down_proj.weight"] *= 1e-4
    mlp = skeleton.blocks[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + also * x
    found = {fold.producer for fold in find_folds(skeleton, Stage()) if fold.block == 1}
    assert ("post_attention_layernorm" in found) == (not also)
    assert "input_layernorm" in found


# ---- storing a scale


def norm_of(offset: float, *keys: str, size: int = 6) -> Fold:
    return Fold(0, "norm", keys, offset, None, 0, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_divided_in_its_stored_type_and_its_scale_make_the_norm_it_was(
    dtype: torch.dtype, offset: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (1 - offset + 0.3 * torch.randn(200, generator=generator)).to(dtype).float()
    target = torch.exp(torch.randn(200, generator=generator))
    fold = norm_of(offset, "w", size=200)
    scale = fold.storable(target, {"w": weight}, dtype)
    stored = fold.divided_vectors({"w": weight}, scale)["w"].to(dtype).float()
    torch.testing.assert_close((stored + offset) * scale, weight + offset, rtol=1e-6, atol=0)
    # Half a unit in the last place of the quotient; of 1 + weight that is as much as of weight, where this is larger.
    gain = (weight + offset) / target
    allowed = (1 + (gain - offset).abs() / gain.abs()) * torch.finfo(dtype).eps
    assert bool(((scale / target - 1).abs() <= allowed).all())
    assert (dtype == torch.float32) == torch.allclose(scale, target, rtol=1e-6)


def test_channels_whose_norm_cannot_be_divided_keep_their_scale() -> None:
    weight = torch.tensor([0.0, 1.0, 1e-6, 60000.0, -3.0, 2.0]).half().float()
    target = torch.tensor([5.0, 1e6, 4.0, 0.5, 3.0, float("inf")])
    scale = norm_of(0.0, "w").storable(target, {"w": weight}, torch.float16)
    assert scale.tolist() == pytest.approx([1, 1, 1, 1, 3, 1], rel=1e-3)


def test_a_norm_with_a_bias_takes_powers_of_two_which_divide_both_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    own = {"w": torch.randn(50, generator=generator).bfloat16().float(), "b": torch.randn(50, generator=generator)}
    own["b"] = own["b"].bfloat16().float()
    own["b"][3] = 0
    target = torch.exp(2 * torch.randn(50, generator=generator))
    fold = norm_of(0.0, "w", "b", size=50)
    scale = fold.storable(target, own, torch.bfloat16)
    assert torch.equal(scale, torch.exp2(torch.log2(target).round()))
    for key, divided in fold.divided_vectors(own, scale).items():
        assert torch.equal(divided.bfloat16().float() * scale, own[key])


def test_a_projections_bias_decides_its_scale_but_where_it_is_zero() -> None:
    bias = torch.tensor([0.0, 1.0, -0.37, 0.2]).bfloat16().float()
    rows = Slot("x.up.weight", "up.weight", 0, 4, 8)
    fold = Fold(0, "up", ("up.bias",), 0.0, rows, 1, 3)
    target = torch.tensor([1.3, 1.7, 0.6])
    scale = fold.storable(target, {"up.bias": bias}, torch.bfloat16)
    stored = fold.divided_vectors({"up.bias": bias}, scale)["up.bias"].bfloat16().float()
    torch.testing.assert_close(stored[1:] * scale, bias[1:], rtol=1e-6, atol=0)
    assert stored[0] == bias[0]  # not one of the fold's channels
    assert not torch.equal(scale, target)
    free = Fold(0, "up", ("up.bias",), 0.0, rows, 0, 1)
    assert free.storable(target[:1], {"up.bias": bias}, torch.bfloat16) == target[:1]


# ---- the same model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen2", "gemma2", "phi3", "gpt-neox", "opt", "gpt2"])
def test_a_rewritten_model_is_the_model_in_the_types_it_is_stored_in(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the scales are."""
    generator = torch.Generator().manual_seed(0)

    def any_scale(problem: Problem) -> Chosen:
        scale = problem.storable(torch.exp(torch.randn(problem.weight.shape[1], generator=generator)))
        return Chosen(scale, 1.0, 1.0, {})

    monkeypatch.setitem(SCALES, "awq", any_scale)
    monkeypatch.setitem(SCALES, "dual_scale", any_scale)
    skeleton = skeleton_of(family, dtype)
    folds, ids = find_folds(skeleton, Stage()), random_ids(3, 20)
    changes, _ = rewrite(skeleton, folds, RECIPE, None, Stage())
    rewritten = Rewritten(skeleton.source, changes)
    own, after = logits(skeleton.source, ids), logits(rewritten, ids)
    assert (after - own).abs().max() <= 1e-5 * own.abs().max()
    assert Skeleton(rewritten, CPU, torch.float32).prove() <= 1e-5
    assert prove_same(skeleton.source, rewritten, CPU) <= 1e-5 * float(own.abs().max())
    for fold in folds:
        for reader in fold.readers:
            before, now = skeleton.source.read(reader.name).float(), rewritten.read(reader.name)
            assert float((now - before).norm() / before.norm()) > 0.3
    assert all(vector.dtype == dtype for vector in changes.vectors.values())
    assert set(changes.vectors) == {f"{skeleton.blocks_name}.{f.block}.{key}" for f in folds for key in f.vectors}
    for name, vector in changes.vectors.items():
        assert not torch.allclose(vector, skeleton.source.read(name), rtol=0.3)


def test_a_model_that_is_not_the_same_is_refused_with_the_difference() -> None:
    source = skeleton_of("llama").source
    name = "model.layers.1.input_layernorm.weight"
    wrong = Rewritten(source, Changes({name: source.read(name) * 1.01}))
    with pytest.raises(SourceError, match=r"not the same model after its rewrites\n.*logits differ by up to"):
        prove_same(source, wrong, CPU)


# ---- scales

GRID = Grid(2, 8, False, torch.float32)
ROWS, COLUMNS = 12, 24


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which some are larger than others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(COLUMNS, generator=generator))
    mixing = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    x = torch.randn(300, COLUMNS, generator=generator) @ mixing * sizes
    return torch.randn(ROWS, COLUMNS, generator=generator) ** 3, x


def problem_of(weight: Tensor, x: Tensor, storable: Callable[[Tensor], Tensor] = lambda s: s) -> Problem:
    inputs = Inputs(x.T @ x / len(x), x.abs().mean(0))
    return Problem(weight, functools.partial(_rounded, parts=[(len(weight), GRID)], start=minmax), storable, inputs)


def plain_rounding(weight: np.ndarray) -> np.ndarray:
    """Round to nearest on the range of each eight weights, in float64."""
    out = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 8):
            group = weight[row, first : first + 8]
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            step = (high - low) / 3
            zero = np.clip(np.round(-low / step), 0, 3)
            out[row, first : first + 8] = step * (np.clip(np.round(group / step) + zero, 0, 3) - zero)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_awq_takes_the_ratio_of_the_least_output_error(seed: int) -> None:
    weight, x = layer(seed)
    chosen = awq(problem_of(weight, x))
    w, inputs = weight.double().numpy(), x.double().numpy()
    size, errors, scales = np.abs(inputs).mean(0), [], []
    for step in range(20):
        s = np.maximum(size ** (step / 20), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        errors.append(np.mean(np.sum((inputs @ (plain_rounding(w * s) / s - w).T) ** 2, axis=1)))
        scales.append(s)
    best, whole = int(np.argmin(errors)), np.mean(np.sum((inputs @ w.T) ** 2, axis=1))
    assert chosen.by == {"ratio": best / 20}
    assert chosen.before == pytest.approx(errors[0] / whole, rel=1e-4)
    assert chosen.after == pytest.approx(errors[best] / whole, rel=1e-4)
    assert chosen.scale.double().numpy() == pytest.approx(scales[best], rel=1e-5)


def test_awq_chooses_other_ratios_for_other_layers() -> None:
    """Or the test above would not tell."""
    assert len({awq(problem_of(*layer(seed))).by["ratio"] for seed in range(6)} - {0.0}) >= 3
    assert RATIOS[0] == 0 and RATIOS[-1] == 0.95 and len(RATIOS) == 20


@pytest.mark.parametrize("seed", range(6))
def test_the_dual_scale_is_the_alternating_formula(seed: int) -> None:
    weight, x = layer(seed)
    chosen = dual_scale(problem_of(weight, x))
    w = weight.double().numpy()
    c, errors, tried = np.ones(COLUMNS), [], []
    for _ in range(16):
        d = plain_rounding(w / c)
        errors.append(np.sum((w - d * c) ** 2))
        tried.append(c)
        new = c.copy()
        for h in range(COLUMNS):
            above, below = np.dot(w[:, h], d[:, h]), np.dot(d[:, h], d[:, h])
            if below > 0 and above > 0:
                new[h] = above / below
        c = new
    best = int(np.argmin(errors))
    assert ROUNDS == 15 and best > 0
    assert chosen.by == {"round": best}
    assert chosen.before == pytest.approx(errors[0] / np.sum(w**2), rel=1e-5)
    assert chosen.after == pytest.approx(errors[best] / np.sum(w**2), rel=1e-4)
    assert (1 / chosen.scale).double().numpy() == pytest.approx(tried[best], rel=1e-4)


def coarse(scale: Tensor) -> Tensor:
    """As where only powers of two can be stored, and some inputs take none."""
    stored = torch.exp2(torch.log2(scale).round())
    return torch.where(torch.arange(COLUMNS) % 3 == 0, torch.ones_like(stored), stored)


@pytest.mark.parametrize("method", [awq, dual_scale])
@pytest.mark.parametrize("storable", [lambda s: s, coarse])
def test_no_scale_is_worse_than_none_and_what_is_measured_is_what_can_be_stored(
    method: Callable[[Problem], Chosen], storable: Callable[[Tensor], Tensor]
) -> None:
    gains = 0
    for seed in range(12):
        weight, x = layer(seed + 20)
        problem = problem_of(weight, x, storable)
        chosen = method(problem)
        assert bool((chosen.scale > 0).all())
        assert torch.equal(storable(chosen.scale), chosen.scale)

        errors = [problem.error(scale) for scale in (torch.ones(COLUMNS), chosen.scale)]
        before, after = (float((e @ x.T if method is awq else e).square().sum()) for e in errors)
        assert after <= before * (1 + 1e-5)
        assert after / before == pytest.approx(chosen.after / chosen.before, rel=1e-3)
        gains += after < before
    assert gains >= 3


@pytest.mark.parametrize("method", [awq, dual_scale])
def test_inputs_and_weights_of_nothing_but_zeros_keep_a_finite_scale(method: Callable[[Problem], Chosen]) -> None:
    weight, x = layer(0)
    weight[:, 3], x[:, 5] = 0, 0
    for problem in (problem_of(weight, x), problem_of(0 * weight, 0 * x)):
        scale = method(problem).scale
        assert bool(torch.isfinite(scale).all() & (scale > 0).all())


def test_awq_reads_the_full_precision_stream() -> None:
    """The inputs of block 2 are those of the model's own forward, over several batches."""
    skeleton = skeleton_of("llama")
    folds, ids = find_folds(skeleton, Stage()), random_ids(7, 20)
    recipe = RECIPE.but(rewrites=["awq"], start="minmax")
    _, record = rewrite(skeleton, folds, recipe, ids, Stage())
    seen: list[Tensor] = []
    model = load_whole(skeleton.source, CPU, torch.float32)
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
    x = seen[0].flatten(0, 1)
    weight = skeleton.load_block(2)["mlp.down_proj.weight"]
    rounded = functools.partial(_rounded, parts=[(len(weight), recipe.grid)], start=minmax)
    expected = awq(Problem(weight, rounded, lambda s: s, Inputs(x.T @ x / len(x), x.abs().mean(0))))
    (found,) = [fold for fold in record if fold["block"] == 2 and fold["into"] == ["mlp.down_proj"]]
    assert found["ratio"] == expected.by["ratio"] > 0
    assert found["error_before"] == pytest.approx(expected.before, rel=1e-4)
    assert found["error_after"] == pytest.approx(expected.after, rel=1e-4)


def test_the_dual_scale_goes_on_from_what_awq_left() -> None:
    skeleton = skeleton_of("llama")
    folds, ids = find_folds(skeleton, Stage()), random_ids(7, 20)
    both, record = rewrite(skeleton, folds, RECIPE, ids, Stage())
    alone, _ = rewrite(skeleton, folds, RECIPE.but(rewrites=["awq"]), ids, Stage())
    name = "model.layers.0.mlp.down_proj.weight"
    scaled = skeleton.source.read(name) * alone.second[name]
    rounded = functools.partial(_rounded, parts=[(len(scaled), RECIPE.grid)], start=STARTS["searched"])
    chosen = dual_scale(Problem(scaled, rounded, lambda s: s))
    torch.testing.assert_close(both.second[name], alone.second[name] * chosen.scale)
    (found,) = [fold for fold in record if fold["block"] == 0 and fold["rewrite"] == "dual_scale"]
    assert (found["round"], found["error_after"]) == (chosen.by["round"], pytest.approx(chosen.after))
    assert found["round"] > 0


# ---- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose norms are in bfloat16, some of their channels much larger than others."""
    model = random_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, dtype="bfloat16"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            elif "layers" in name:
                parameter.copy_(torch.exp(torch.randn(parameter.shape, generator=generator)))
    return save(model.bfloat16(), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose(700), encoding="utf-8")
    return path


def recipe(text: Path, *rewrites: str, **changes: Any) -> Recipe:
    made = {**TINY, "calibration": f"text:{text}", "compute_dtype": "float32", "rewrites": rewrites, **changes}
    return Recipe.load(None, **made)


@pytest.fixture(scope="module")
def rounded(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model rounded at 8 bits as it came."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    logitwise.quantize(folder, out, recipe(text, bits=8, method="rtn"))
    return out


IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
NORMS = [
    f"model.layers.{block}.{norm}.weight"
    for block in (0, 1)
    for norm in ("input_layernorm", "post_attention_layernorm")
]


@pytest.mark.parametrize(
    "changes", [{}, {"polish": True, "polish_steps": 4}, {"method": "rtn", "start": "gptq"}], ids=str
)
def test_a_checkpoint_of_a_rewritten_model_is_the_model_that_was_measured(
    folder: Path, rounded: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    made = recipe(text, "awq", "dual_scale", bits=8, steps=2, **changes)
    result = logitwise.quantize(folder, tmp_path / "out", made)
    own = logits_of(folder, IDS)
    assert (logits_of(tmp_path / "out", IDS) - dense_logits(folder, tmp_path / "out", IDS)).abs().max() < 1e-4
    # Norms and codes that do not belong together would be far from the original; this is nearer than rounding alone.
    assert (logits_of(tmp_path / "out", IDS) - own).norm() < (logits_of(rounded, IDS) - own).norm() < 0.05 * own.norm()
    before, after = open_source(folder), open_source(tmp_path / "out")
    for name in NORMS:
        assert after.read(name).dtype == torch.bfloat16
        assert not torch.allclose(after.read(name).float(), before.read(name).float(), rtol=0.02)
    told = [fate["tensor"] for fate in result.report["audit"] if fate["why"].endswith("block; rewritten")]
    assert sorted(told) == sorted(NORMS)
    assert result.report["rewrites"]["logit_difference"] < 1e-5 * float(own.abs().max())
    assert {(f["block"], f["rewrite"], f["from"]) for f in result.report["rewrites"]["folds"]} == {
        *((block, "awq", name) for block in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")),
        *((block, rewrite, "mlp.up_proj") for block in (0, 1) for rewrite in ("awq", "dual_scale")),
    }


def test_awq_lowers_the_output_error_that_it_says(folder: Path, text: Path, tmp_path: Path) -> None:
    listener = Listener()
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, "awq", method="rtn"), watcher=listener)
    errors = [(fold["error_before"], fold["error_after"]) for fold in result.report["rewrites"]["folds"]]
    assert all(after <= before for before, after in errors)
    assert sum(after for _, after in errors) < 0.95 * sum(before for before, _ in errors)
    assert any(said.startswith("awq: 6 folds in 2 blocks, mean relative error") for said in listener.said)


def test_the_dual_scale_alone_reads_no_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("text was asked for")

    monkeypatch.setattr(pipeline, "rows_of_run", refuse)
    made = Recipe.load(None, **{**TINY, "method": "rtn", "rewrites": ["dual_scale"]})
    result = logitwise.quantize(folder, tmp_path / "out", made)
    assert result.report["calibration"] == {}
    assert [fold["from"] for fold in result.report["rewrites"]["folds"]] == ["mlp.up_proj"] * 2
    with pytest.raises(AssertionError, match="text was asked for"):
        logitwise.quantize(folder, tmp_path / "awq", made.but(rewrites=["awq"]))


@pytest.mark.parametrize("keep", ["q_proj", "layers.1.mlp.up_proj"])
def test_what_a_kept_matrix_reads_is_left_as_it_is_and_that_is_said(
    folder: Path, text: Path, tmp_path: Path, keep: str
) -> None:
    listener = Listener()
    made = recipe(text, "awq", method="rtn", keep=(keep,))
    result = logitwise.quantize(folder, tmp_path / "out", made, watcher=listener)
    left = {
        "q_proj": ["block 0: input_layernorm", "block 1: input_layernorm"],
        "layers.1.mlp.up_proj": ["block 1: post_attention_layernorm", "block 1: mlp.up_proj"],
    }[keep]
    assert result.report["rewrites"]["left_alone"] == left
    assert f"not rewritten, since --keep has a matrix that would change: {', '.join(left)}" in listener.said
    before, after = open_source(folder), open_source(tmp_path / "out")
    for name in NORMS:
        same = torch.equal(before.read(name), after.read(name))
        assert same == any(name.endswith(f"{one[6]}.{one[9:]}.weight") for one in left)
    kept = [name for name in before.names() if keep in name]
    assert kept and all(torch.equal(before.read(name), after.read(name)) for name in kept)


def test_rewrites_are_kept_for_the_next_run_and_others_are_made_anew(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    run = {"run_folder": tmp_path / "run", "keep_run": True}

    def noting(folder: RunFolder, key: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        saved.append("rewrite" if "left_alone" in record else "window" if "objective" in record else "rows")
        true_write(folder, key, tensors, record)

    true_write = RunFolder.write
    monkeypatch.setattr(RunFolder, "write", noting)

    def writes(name: str, *rewrites: str, **changes: Any) -> list[str]:
        saved.clear()
        logitwise.quantize(folder, tmp_path / name, recipe(text, *rewrites, steps=2, **changes), **run)
        return list(saved)

    windows = ["window"] * 3
    assert writes("plain") == ["rows", *windows]
    assert writes("awq", "awq") == ["rewrite", *windows]
    assert writes("again", "awq") == []
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "awq/model.safetensors").read_bytes()
    assert writes("both", "dual_scale", "awq") == ["rewrite", *windows]
    assert writes("order", "awq", "dual_scale") == []
    assert writes("last", "awq", objective="mse") == []
    assert writes("topk", "awq", objective="topk") == ["window"]
    assert writes("bits", "awq", bits=3) == ["rewrite", *windows]


# ---- what is refused


def test_a_rewrite_that_is_not_known_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rewrites.0 = 'smooth' is not possible\n.*'awq' or 'dual_scale'"):
        Recipe.load(None, rewrites=["smooth"])


def test_a_rewrite_that_finds_nothing_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    def refused(message: str, model: Path, made: Recipe) -> None:
        with pytest.raises(RecipeError, match=message):
            logitwise.quantize(model, tmp_path / "out", made)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = Starcoder2Config(**sizes, num_key_value_heads=2, vocab_size=120, bos_token_id=0, eos_token_id=1)
    coder, made = save(random_model(config), tmp_path / "coder"), recipe(text, "awq", "dual_scale")
    refused("dual_scale finds nothing to rewrite in coder\n.*no scale can move.*\n.*leave dual_scale out", coder, made)
    kept = made.but(keep=("down_proj",))
    refused("dual_scale finds nothing to rewrite in tiny\n.*--keep has a matrix of every fold", folder, kept)
