"""Refit: a checkpoint of any format made better in place, and the pairs that are refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save
from test_pipeline import Listener, folder, recipe, text  # noqa: F401
from torch import Tensor
from typer.testing import CliRunner

import logitwise
from logitwise.cli import app
from logitwise.errors import CalibrationError, MachineError, OutputError, RecipeError, SourceError, UnmetError
from logitwise.evaluation import evaluate
from logitwise.formats import FORMATS
from logitwise.formats.auto_round import packed_as
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.grid import Grid, Quantized
from logitwise.pair import likeness
from logitwise.polish import Polish
from logitwise.quantizers import QUANTIZERS, STARTS, Reopened
from logitwise.refitting import READ, refit
from logitwise.source import QuantizedSource, open_source, open_stored

TINY = {"rows": 24, "held_out": 8, "row_tokens": 24, "steps": 12, "batch": 4, "checks": 2}
LAST = "model.layers.1."


def asked(text: Path, **changes: object) -> logitwise.Recipe:  # noqa: F811
    fast = {role: {"optimizer": "adam", "rate": 2e-2, "schedule": "cosine"} for role in ("scale", "rounding")}
    return logitwise.Recipe.load("refit", **{**TINY, "learning": fast, "calibration": f"text:{text}", **changes})


def rounded(folder: Path, text: Path, out: Path, **changes: object) -> Path:  # noqa: F811
    """A checkpoint that was rounded to nearest."""
    settings = {"method": "rtn", "objective": "mse", "scale_dtype": "float16", "bits": 3, "group_size": 32, **changes}
    logitwise.quantize(folder, out, recipe(text, **settings))
    return out


def codes_of(model: Path) -> dict[str, Quantized]:
    source = open_stored(model)
    assert isinstance(source, QuantizedSource)
    return {name: found for name in source.names() if (found := source.quantized(name)) is not None}


def files_of(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "compressed-tensors"},
        {"format": "compressed-tensors", "bits": 4, "symmetric": True},
        {"format": "gptq", "bits": 2},
        {"format": "gptq", "bits": 4, "symmetric": True},
        {"format": "awq", "bits": 4},
        {"format": "mlx", "bits": 2, "scale_dtype": "float32"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_last_block_is_made_better_and_nothing_else_is_touched(
    changes: dict[str, object],
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    size = 16 if changes["format"] != "mlx" else 32
    model = folder if size == 16 else wide(tmp_path / "wide")
    came = rounded(model, text, tmp_path / "came", group_size=size, **changes)
    before = files_of(came)
    found = refit(came, tmp_path / "made", original=model, recipe=asked(text))
    assert files_of(came) == before
    made = files_of(tmp_path / "made")
    assert set(made) == {*before, "refit.json"}
    assert {name for name in before if made[name] != before[name]} == {"model.safetensors"}
    assert len(made["model.safetensors"]) == len(before["model.safetensors"])
    old, new = load_file(came / "model.safetensors"), load_file(tmp_path / "made" / "model.safetensors")
    differ = {name for name in old if not torch.equal(old[name], new[name])}
    assert differ
    assert all(name.startswith(LAST) for name in differ)
    assert {name: (x.dtype, x.shape) for name, x in old.items()} == {
        name: (x.dtype, x.shape) for name, x in new.items()
    }
    first, second = codes_of(came), codes_of(tmp_path / "made")
    assert all(torch.equal(first[name].zero, second[name].zero) for name in first)
    assert {name: one.grid for name, one in first.items()} == {name: one.grid for name, one in second.items()}
    assert found.after.kl.mean < found.before.kl.mean
    assert found.less.mean == pytest.approx(found.before.kl.mean - found.after.kl.mean)
    report = json.loads(made["refit.json"])
    assert report["after"]["kl"]["mean"] == found.after.kl.mean
    assert report["changed"] == sorted(
        name
        for name in first
        if any(not torch.equal(a, b) for a, b in zip(first[name].parts(), second[name].parts(), strict=True))
    )
    assert not (tmp_path / "made.run").exists()


def wide(place: Path) -> Path:
    """A model whose layers groups of 32 divide."""
    if not place.exists():
        model = random_model(
            llama_config(hidden_size=64, head_dim=16, intermediate_size=96, max_position_embeddings=128)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        save(model, place)
    return place


def test_the_figures_are_those_of_evaluate(folder: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """On rows given by hand, of which the last are held out: what is on disk has the KL that is reported."""
    from logitwise.calibration import documents_of, separator_of
    from logitwise.calibration.rows import pack

    tokenizer = open_source(folder).tokenizer()
    documents = documents_of(f"text:{text}", tokenizer, lambda: None, tokens=900, seed=0)
    rows = pack(documents, separator_of(tokenizer), 24)[:32]
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    found = refit(came, tmp_path / "made", original=folder, recipe=asked(text), rows=rows)
    held = tmp_path / "held.txt"
    held.write_text("")
    from logitwise.evaluation import measure_models

    original = open_source(folder)
    for model, reported in ((came, found.before), (tmp_path / "made", found.after)):
        (measured,) = measure_models([open_source(model)], original, rows[-8:], "cpu")
        assert measured.kl == reported.kl
        assert measured.perplexity == reported.perplexity


@pytest.mark.parametrize("head", ["polished", "rounded"])
def test_what_chooses_the_iterate_is_the_verdicts_kl_whatever_became_of_the_head(
    head: str,
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The original's answers are by its own norm and head, not by those of the checkpoint."""
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    tensors = load_file(came / "model.safetensors")
    if head == "polished":
        tensors["model.norm.weight"] *= torch.linspace(0.5, 1.5, len(tensors["model.norm.weight"]))
    else:
        tensors["lm_head.weight"] *= torch.linspace(0.8, 1.2, len(tensors["lm_head.weight"])).unsqueeze(-1)
    save_file(tensors, came / "model.safetensors", {"format": "pt"})
    found = refit(came, tmp_path / "made", original=folder, recipe=asked(text, device="cpu", compute_dtype="float32"))
    measured = min(value for _, value in found.report["window"]["held_out"])
    assert measured == pytest.approx(found.after.kl.mean, rel=1e-4)


def test_the_polish_tunes_every_scale_with_codes_frozen(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    alone = refit(came, tmp_path / "alone", original=folder, recipe=asked(text))
    found = refit(came, tmp_path / "made", original=folder, recipe=asked(text, polish=True, polish_steps=8))
    assert found.after.kl.mean < alone.after.kl.mean
    first, fitted, second = codes_of(came), codes_of(tmp_path / "alone"), codes_of(tmp_path / "made")
    for name in first:
        assert torch.equal(second[name].codes, fitted[name].codes)
        assert torch.equal(second[name].zero, first[name].zero)
        if not name.startswith(LAST):
            assert torch.equal(second[name].codes, first[name].codes)
    assert any(not torch.equal(second[name].scale, fitted[name].scale) for name in first if not name.startswith(LAST))
    a, b = open_source(came), open_source(tmp_path / "made")
    moved = {name for name in a.names() if name not in first and not torch.equal(a.read(name), b.read(name))}
    assert moved
    assert all(name.endswith("norm.weight") for name in moved)
    differ = {name for name in first if any(map(unlike, first[name].parts(), second[name].parts()))}
    assert set(found.report["changed"]) == moved | differ


def unlike(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)


def test_the_same_command_goes_on_where_it_ended(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    whole = refit(came, tmp_path / "whole", original=folder, recipe=asked(text, polish=True, polish_steps=8))

    def stops(self: Polish, *rest: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Polish, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            refit(came, tmp_path / "made", original=folder, recipe=asked(text, polish=True, polish_steps=8))
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(sys.modules["logitwise.refitting"], "fit", None)  # what was fitted is not fitted again
    again = refit(came, tmp_path / "made", original=folder, recipe=asked(text, polish=True, polish_steps=8))
    assert again.after.kl == whole.after.kl
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "made"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_gguf_file_is_refitted_in_place(text: Path, tmp_path: Path) -> None:  # noqa: F811
    model = wide(tmp_path / "wide")
    came = rounded(model, text, tmp_path / "came", format="gguf", bits=3)
    (file,) = came.glob("*.gguf")
    found = refit(file, tmp_path / "made", original=model, recipe=asked(text, polish=True, polish_steps=8))
    (made,) = (tmp_path / "made").glob("*.gguf")
    assert made.stat().st_size == file.stat().st_size
    assert found.after.kl.mean < found.before.kl.mean
    first, second = codes_of(file), codes_of(made)
    assert {name: one.grid for name, one in first.items()} == {name: one.grid for name, one in second.items()}
    (measured, same) = (
        evaluate(place, reference=model, text=f"text:{text}", row_tokens=24).likelihood.kl
        for place in (made, made.parent)
    )
    assert measured == same


def test_a_gguf_file_that_is_given_by_its_folder_keeps_what_lies_beside_it(text: Path, tmp_path: Path) -> None:  # noqa: F811
    model = wide(tmp_path / "wide")
    (model / "LICENSE").write_text("free")
    came = rounded(model, text, tmp_path / "came", format="gguf", bits=3)
    (came / "photographs.tar").write_bytes(bytes(100))
    (tmp_path / "secret").write_text("a secret")
    (came / "NOTICE").symlink_to("../secret")
    refit(came, tmp_path / "made", original=model, recipe=asked(text))
    beside = {file.name for file in came.iterdir() if file.suffix not in (".gguf", ".tar")} - {"NOTICE"}
    assert {"LICENSE", "generation_config.json", "logitwise.json"} <= beside
    assert {file.name for file in (tmp_path / "made").iterdir() if file.suffix != ".gguf"} == {*beside, "refit.json"}
    assert (tmp_path / "made" / "LICENSE").read_text() == "free"
    logitwise.export(tmp_path / "made", tmp_path / "other", "mlx")
    assert (tmp_path / "other" / "LICENSE").read_text() == "free"


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"])
def test_a_checkpoint_of_autoround_is_refitted(packing: str, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """As it writes them: no g_idx, scales of either sign, one layer of other bits and one in full precision."""
    model, awq = wide(tmp_path / "wide"), packing.endswith("awq")
    bits, symmetric = 4 if awq else 2, packing != "auto_round"
    config = {"quant_method": "auto-round", "packing_format": packing, "data_type": "int", "iters": 2}
    config |= {"bits": bits, "group_size": 32, "sym": symmetric, "autoround_version": "0.16.1"}
    config["extra_config"] = {f"{LAST}mlp.up_proj": {"bits": 4}, "layers.1.*down_proj": {"bits": 16}}
    came = rounded(model, text, tmp_path / "came", bits=bits, group_size=32, symmetric=symmetric)
    form, first, source = packed_as(config), codes_of(came), open_source(model)
    grid_of, tensors = form.grids_of(config, torch.float16), dict[str, Tensor]()
    for name in source.names():
        module = name.removesuffix(".weight")
        if name not in first or module == f"{LAST}mlp.down_proj":
            tensors[name] = source.read(name)
            continue
        made = first[name]
        if made.grid != grid_of(module):
            made = QUANTIZERS["rtn"].start(source.read(name).float(), grid_of(module), STARTS["minmax"]).freeze()
        elif symmetric:  # a group's other sign: the same weights but for those of code 0
            codes = torch.where(made.codes == 0, made.grid.levels, 2 * made.grid.middle - made.codes.int())
            made = replace(made, codes=codes.to(torch.uint8), scale=-made.scale)
        else:
            made = replace(made, zero=made.zero.clamp(min=1))
        tensors |= form.tensors(module, made)
    save_file(tensors, came / "model.safetensors", {"format": "pt"})
    described = json.loads((came / "config.json").read_text()) | {"quantization_config": config}
    (came / "config.json").write_text(json.dumps(described))
    found = refit(came, tmp_path / "made", original=model, recipe=asked(text, polish=True, polish_steps=8))
    assert found.after.kl.mean < found.before.kl.mean
    old, new = load_file(came / "model.safetensors"), load_file(tmp_path / "made" / "model.safetensors")
    assert {name: (x.dtype, x.shape) for name, x in old.items()} == {
        name: (x.dtype, x.shape) for name, x in new.items()
    }
    zeros = {name for name in old if name.endswith("qzeros")}
    assert all(torch.equal(old[name], new[name]) for name in zeros)
    assert (tmp_path / "made" / "config.json").read_bytes() == (came / "config.json").read_bytes()
    second = codes_of(tmp_path / "made")
    assert {str(one.grid.bits) for one in second.values()} == {str(bits), "4"}
    assert f"{LAST}mlp.down_proj.weight" not in second
    assert any(bool((one.scale < 0).any()) for one in second.values()) or not symmetric


def test_float_minima_are_refitted(text: Path, tmp_path: Path) -> None:  # noqa: F811
    """As mlx's own quantizer writes them: code 0 is the least weight of its group."""
    model = wide(tmp_path / "wide")
    came = rounded(model, text, tmp_path / "came", format="mlx", scale_dtype="float32", bits=2)
    stored = load_file(came / "model.safetensors")
    source = open_source(model)
    for name in [name for name in stored if name.endswith(".biases")]:
        prefix = name.removesuffix(".biases")
        weight = source.read(f"{prefix}.weight").float()
        grouped = weight.view(weight.shape[0], -1, 32)
        least, scale = grouped.amin(-1), (grouped.amax(-1) - grouped.amin(-1)) / 3
        codes = ((grouped - least.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 3).to(torch.uint8).flatten(1)
        zero = torch.zeros_like(scale, dtype=torch.uint8)
        grid = Grid(2, 32, False, torch.float32, minimum=True)
        stored |= FORMATS["mlx"].tensors(prefix, Quantized(codes, scale, zero, grid, least))
    save_file(stored, came / "model.safetensors", {"format": "mlx"})
    found = refit(came, tmp_path / "made", original=model, recipe=asked(text, polish=True, polish_steps=8))
    assert found.after.kl.mean < found.before.kl.mean
    second = codes_of(tmp_path / "made")
    assert all(one.grid.minimum for one in second.values())
    first = codes_of(came)
    assert any(not torch.equal(first[name].minimum, second[name].minimum) for name in first)  # type: ignore[arg-type]


def test_a_rescaled_checkpoint_is_fitted_from_its_own_weights(text: Path, tmp_path: Path) -> None:  # noqa: F811
    """As AWQ does before it quantizes: channels of the norm over those of the projections that read it."""
    model = wide(tmp_path / "wide")
    stored = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for block in range(2):
        prefix = f"model.layers.{block}."
        factors = torch.exp(0.6 * torch.randn(64, generator=generator))
        stored[f"{prefix}input_layernorm.weight"] /= factors
        for name in ("q_proj", "k_proj", "v_proj"):
            stored[f"{prefix}self_attn.{name}.weight"] *= factors
    other = tmp_path / "rescaled"
    other.mkdir()
    for name, content in files_of(model).items():
        (other / name).write_bytes(content)
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    came = rounded(other, text, tmp_path / "came")
    listener = Listener()
    found = refit(came, tmp_path / "made", original=model, recipe=asked(text), watcher=listener)
    assert found.report["rescaled"] == sorted(
        f"model.layers.{block}.self_attn.{name}" for block in range(2) for name in ("q_proj", "k_proj", "v_proj")
    )
    assert any("6 of 14 layers were rescaled" in sentence for sentence in listener.said)
    assert found.after.kl.mean < found.before.kl.mean


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("start", STARTS)
def test_rounding_is_not_taken_for_rescaling(bits: int, start: str) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(bits)) ** 3
    stored = QUANTIZERS["rtn"].start(weight, Grid(bits, 32, False), STARTS[start]).freeze().dequantize()
    cosine, spread = likeness(stored, weight)
    assert cosine > 0.8
    assert spread < 0.08
    factors = torch.exp(0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1)))
    assert likeness(stored * factors, weight)[1] > 0.1
    assert likeness(stored * torch.exp(0.3 * torch.randn(96, 1)), weight)[1] > 0.1
    other = torch.randn(96, 64, generator=torch.Generator().manual_seed(99))
    assert likeness(other, weight)[0] < 0.3
    assert likeness(torch.zeros(4, 4), torch.zeros(4, 4)) == (1.0, 0.0)


def test_pairs_that_do_not_belong_together_are_refused(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    out = tmp_path / "made"
    with pytest.raises(SourceError, match=r"is not quantized\n.*full precision"):
        refit(folder, out, original=folder, recipe=asked(text))
    with pytest.raises(SourceError, match=r"came is quantized\n.*its weights are codes"):
        refit(came, out, original=came, recipe=asked(text))
    stranger = random_model(
        llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    other = save(stranger, tmp_path / "other")
    with pytest.raises(SourceError, match=r"was not quantized from .*other\n.*cosine of model\.layers\.0"):
        refit(came, out, original=other, recipe=asked(text))
    smaller = save(random_model(llama_config(hidden_size=32)), tmp_path / "smaller")
    with pytest.raises(SourceError, match=r"not a version of smaller\n.*another shape"):
        refit(came, out, original=smaller, recipe=asked(text))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for name, content in files_of(folder).items():
        (renamed / name).write_bytes(content)
    table = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (renamed / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(SourceError, match="have different tokenizers"):
        refit(came, out, original=renamed, recipe=asked(text))
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 3}, RecipeError, r"bits is not read by refit\n.*the checkpoint decides"),
        ({"format": "gptq"}, RecipeError, "format is not read by refit"),
        ({"polish_rows": 4}, RecipeError, r"polish_rows is not read\n.*without --polish"),
        ({"objective": "mse"}, RecipeError, r"objective mse cannot refit\n.*\n.*choose .*lfq"),
        ({"objective": "lfg"}, RecipeError, "objective lfg cannot refit"),
        ({"objective_settings": {"heat": 1}}, RecipeError, r"objective_settings\.heat is not read"),
        (
            {"learning": {"scal": {"optimizer": "adam", "rate": 1e-3, "schedule": "cosine"}}},
            RecipeError,
            r"learning\.scal\] is not read\n.*scale, rounding",
        ),
        ({"temperature": 0.5}, RecipeError, r"temperature is not read\n.*is read, not written"),
        ({"held_out": 0}, CalibrationError, "no rows are held out"),
        ({"final_blocks": 9}, RecipeError, r"final_blocks 9 is too many\n.*2 blocks"),
    ],
)
def test_recipes_that_cannot_refit_are_refused(
    changes: dict[str, object],
    error: type[Exception],
    message: str,
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    with pytest.raises(error, match=message):
        refit(came, tmp_path / "made", original=folder, recipe=asked(text, **changes))
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "made.run").exists()


def test_nothing_is_written_where_nothing_is_gained(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    with pytest.raises(UnmetError, match=r"the refit is no better than .*came\n.*8 held-out rows.*nothing was written"):
        refit(came, tmp_path / "made", original=folder, recipe=asked(text, steps=0))
    assert not (tmp_path / "made").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        refit(came, tmp_path / "full", original=folder, recipe=asked(text))


def test_what_is_read_back_otherwise_does_not_appear(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    laid_out = CompressedTensors._laid_out

    def off_by_one(self: CompressedTensors, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        return laid_out(self, prefix, replace(quantized, codes=quantized.codes ^ 1))

    monkeypatch.setattr(CompressedTensors, "_laid_out", off_by_one)
    with pytest.raises(MachineError, match="is not read back as it was written"):
        refit(came, tmp_path / "made", original=folder, recipe=asked(text))
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "made.run").exists()


def test_every_key_that_is_read_decides_something() -> None:
    assert logitwise.Recipe.model_fields.keys() >= READ
    assert {str(role) for role in Reopened.start(torch.randn(2, 8), Grid(4, 8, False), STARTS["minmax"]).groups()} == {
        "scale",
        "rounding",
    }


def test_command_line(folder: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    came = rounded(folder, text, tmp_path / "came", group_size=16)
    words = ["refit", str(came), str(tmp_path / "made"), "--original", str(folder), "--calibration", f"text:{text}"]
    words += ["--rows", "24", "--row-tokens", "24", "--held-out", "8", "--steps", "12", "--batch", "4", "-q"]
    words += ["--set", "learning.rounding=x"]
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, RecipeError)
    words = [*words[:-2], "--set", "learning={rounding={optimizer='adam',rate=2e-2,schedule='cosine'}}"]
    found = CliRunner().invoke(app, words, catch_exceptions=False)
    assert found.exit_code == 0
    assert "KL is lower by" in found.output
    assert "all others as they were" in " ".join(found.output.split())
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "made")], catch_exceptions=False)
    assert "refitted by logitwise: held-out KL" in found.output
