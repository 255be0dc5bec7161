"""A checkpoint in another format is the same model; what is written is read back before it appears."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pipeline import folder, recipe, text  # noqa: F401
from transformers import GenerationConfig
from typer.testing import CliRunner

import logitwise
from logitwise.cli import app
from logitwise.errors import FormatError, MachineError, SourceError
from logitwise.evaluation import inspect
from logitwise.formats import FORMATS
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.grid import Quantized
from logitwise.source import QuantizedFolder, open_source
from logitwise.writing import read_report


@pytest.fixture(scope="module")
def checkpoint(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A symmetric checkpoint with one layer in full precision."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    asked = recipe(text, method="rtn", bits=4, symmetric=True, objective="mse", keep=("0.mlp.down_proj",))
    logitwise.quantize(folder, out, asked)
    return out


def same(one: Path, other: Path) -> None:
    """Every tensor, codes, scales and zero points are equal."""
    a, b = open_source(one), open_source(other)
    assert isinstance(a, QuantizedFolder)
    assert isinstance(b, QuantizedFolder)
    assert sorted(a.names()) == sorted(b.names())
    for name in a.names():
        assert torch.equal(a.read(name), b.read(name))
        x, y = a.quantized(name), b.quantized(name)
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert torch.equal(x.codes, y.codes)
            assert torch.equal(x.scale, y.scale)
            assert torch.equal(x.zero, y.zero)


def test_an_exported_checkpoint_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    found = logitwise.export(checkpoint, tmp_path / "again", "compressed-tensors")
    same(checkpoint, tmp_path / "again")
    assert found.layers == 13
    report, before = read_report(tmp_path / "again"), read_report(checkpoint)
    assert report is not None
    assert before is not None
    assert report["choices"]["format"] == {"value": "compressed-tensors", "why": "as asked, by export"}
    assert report["audit"] == before["audit"]
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in checkpoint.iterdir()}
    assert inspect(tmp_path / "again").grid == inspect(checkpoint).grid


def test_a_model_that_brings_no_generation_config_uses_its_cache(checkpoint: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    logitwise.export(bare, tmp_path / "out", "compressed-tensors")
    assert GenerationConfig.from_pretrained(tmp_path / "out").use_cache


def test_a_card_has_the_fits_in_their_order(checkpoint: Path, tmp_path: Path) -> None:
    fitted = shutil.copytree(checkpoint, tmp_path / "fitted")
    report = json.loads((fitted / "logitwise.json").read_text("utf-8")) | {"held_out_kl": {"mse": 0.5, "lfq": 0.25}}
    (fitted / "logitwise.json").write_text(json.dumps(report), encoding="utf-8")
    for index, source in enumerate((fitted, tmp_path / "0")):
        logitwise.export(source, tmp_path / str(index), "compressed-tensors")
    assert "| mse | 0.5000 |\n| lfq | 0.2500 |" in (tmp_path / "1" / "README.md").read_text("utf-8")


def test_what_a_refit_changed_is_still_told(checkpoint: Path, tmp_path: Path) -> None:
    refitted = shutil.copytree(checkpoint, tmp_path / "refitted")
    report = {"before": {"kl": {"mean": 0.5}}, "after": {"kl": {"mean": 0.25}}}
    (refitted / "refit.json").write_text(json.dumps(report), encoding="utf-8")
    logitwise.export(refitted, tmp_path / "out", "compressed-tensors")
    assert inspect(tmp_path / "out").refit == report


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_there_and_back_through_every_format_that_holds_the_grid(
    symmetric: bool,
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    asked = recipe(text, method="rtn", bits=4, symmetric=symmetric, objective="mse", scale_dtype="float16")
    logitwise.quantize(folder, tmp_path / "0", asked)
    way = ["gptq", "awq", "gptq", "compressed-tensors"]
    for index, form in enumerate(way):
        logitwise.export(tmp_path / f"{index}", tmp_path / f"{index + 1}", form)
        same(tmp_path / "0", tmp_path / f"{index + 1}")
        report = read_report(tmp_path / f"{index + 1}")
        assert report is not None
        assert report["choices"]["format"]["value"] == form
        config = (tmp_path / f"{index + 1}" / "config.json").read_text()
        assert f'"quant_method": "{form}"' in config
    message = r"mlx cannot hold .*\n.*groups of 32.*\n.*that does: compressed-tensors, gptq, awq"
    with pytest.raises(FormatError, match=message):
        logitwise.export(tmp_path / "0", tmp_path / "mlx", "mlx")


def test_a_checkpoint_that_nobody_reported_on_is_exported_too(checkpoint: Path, tmp_path: Path) -> None:
    logitwise.export(checkpoint, tmp_path / "one", "compressed-tensors")
    for name in ("logitwise.json", "README.md"):
        (tmp_path / "one" / name).unlink()
    logitwise.export(tmp_path / "one", tmp_path / "two", "compressed-tensors")
    same(checkpoint, tmp_path / "two")
    assert not (tmp_path / "two" / "logitwise.json").exists()


@pytest.mark.parametrize("content", ["{}", "[]", "{", "\xff", '{"model": 5}', "[" * 100_000])
@pytest.mark.parametrize("name", ["logitwise.json", "refit.json"])
def test_what_only_looks_like_a_report_is_refused(name: str, content: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / name).write_text(content, encoding="latin-1")
    with pytest.raises(SourceError, match=f"{name} is not(?s:.*)  do:"):
        inspect(copy)
    if name == "logitwise.json":
        with pytest.raises(SourceError, match=f"{name} is not(?s:.*)  do:"):
            logitwise.export(copy, tmp_path / "out", "gptq")
        assert sorted(place.name for place in tmp_path.iterdir()) == ["copy"]


def test_refusals_before_anything_is_written(
    checkpoint: Path,
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Narrow(CompressedTensors):
        def holds(self, grid: object) -> str | None:
            return "narrow holds 8 bits only"

    monkeypatch.setitem(FORMATS, "narrow", Narrow())
    out = tmp_path / "out"
    with pytest.raises(FormatError, match=r"narrow cannot hold .*\n.*8 bits only\n.*one that does: compressed"):
        logitwise.export(checkpoint, out, "narrow")
    with pytest.raises(FormatError, match=r"no format gguff\n.*compressed-tensors.*narrow"):
        logitwise.export(checkpoint, out, "gguff")
    with pytest.raises(SourceError, match=r"is not quantized\n.*full precision"):
        logitwise.export(folder, out, "compressed-tensors")
    assert not list(tmp_path.iterdir())


def off_by_one(self: CompressedTensors, prefix: str, tensors: object, grid: object) -> Quantized:
    found = READ(self, prefix, tensors, grid)  # type: ignore[arg-type]
    return replace(found, zero=found.zero + 1) if prefix.endswith("1.mlp.up_proj") else found


READ = CompressedTensors.read


@pytest.mark.parametrize("how", ["quantize", "export"])
def test_what_is_not_read_back_as_it_was_written_does_not_appear(
    how: str,
    checkpoint: Path,
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, out = recipe(text, method="rtn", bits=4, symmetric=True, objective="mse"), tmp_path / "out"
    copy = tmp_path / "copy"
    logitwise.export(checkpoint, copy, "compressed-tensors")
    monkeypatch.setattr(CompressedTensors, "read", off_by_one)

    def run(verify: bool) -> None:
        if how == "quantize":
            logitwise.quantize(folder, out, asked, verify=verify)
        else:
            monkeypatch.setattr(CompressedTensors, "read", READ)
            source = open_source(copy)
            assert isinstance(source, QuantizedFolder)
            calls = [0]

            def later(self: CompressedTensors, prefix: str, tensors: object, grid: object) -> Quantized:
                calls[0] += 1
                wrong = calls[0] > 13  # the second time through: what was written
                return (off_by_one if wrong else READ)(self, prefix, tensors, grid)  # type: ignore[operator]

            monkeypatch.setattr(CompressedTensors, "read", later)
            logitwise.export(copy, out, "compressed-tensors", verify=verify)

    with pytest.raises(MachineError, match=r"layers.1.mlp.up_proj.weight is not read back as it was written"):
        run(True)
    assert not out.exists()
    run(False)
    assert out.exists()


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "o"), "--format", "compressed-tensors"])
    assert found.exit_code == 0
    assert "13 layers in compressed-tensors" in " ".join(found.stdout.split())
    same(checkpoint, tmp_path / "o")
