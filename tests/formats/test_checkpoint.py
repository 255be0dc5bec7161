"""Checkpoint folders: shards, config.json, and a folder that appears whole or not at all."""

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from logitwise.errors import MachineError, OutputError
from logitwise.formats.checkpoint import check_output, staged, write_checkpoint, write_config


def tensors(count: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of 40 bytes each."""
    return ((f"t{i}", torch.full((10,), float(i))) for i in range(count))


def test_single_file(tmp_path: Path):
    size = write_checkpoint(tmp_path, tensors(3))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert size == (tmp_path / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors(3)) and len(read) == 3


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o700, 0o600), (0o750, 0o640)])
def test_whoever_reads_the_folder_reads_the_weights(tmp_path: Path, folder: int, file: int) -> None:
    """safetensors leaves a file to its owner alone; servers run as others."""
    tmp_path.chmod(folder)
    write_checkpoint(tmp_path, iter([("a", torch.zeros(2))]))
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == file


def test_shards(tmp_path: Path):
    big = ("big", torch.zeros(100))
    size = write_checkpoint(tmp_path, [*tensors(3), big, ("last", torch.ones(1))], shard_bytes=80)
    # Two tensors of 40 bytes fill a shard; one of 400 goes alone.
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    assert size == sum((tmp_path / name).stat().st_size for name in names)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 40 + 400 + 4
    places = dict(zip(["t0", "t1", "t2", "big", "last"], [0, 0, 1, 2, 3], strict=True))
    assert index["weight_map"] == {tensor: names[place] for tensor, place in places.items()}
    assert all(tensor in load_file(tmp_path / name) for tensor, name in index["weight_map"].items())


def test_one_shard_in_memory(tmp_path: Path):
    on_disk, kept = [], []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(5):
            on_disk.append(len(list(tmp_path.iterdir())))
            kept.append([before for before in alive if before() is not None])
            alive.append(weakref.ref(made := tensor.clone()))
            yield name, made
            del made

    alive: list[weakref.ref[Tensor]] = []
    write_checkpoint(tmp_path, watched(), shard_bytes=40)
    assert on_disk == [0, 1, 2, 3, 4]
    assert kept == [[]] * 5  # a full shard does not wait while the next tensor is read


def test_strided_tensor(tmp_path: Path):
    tensor = torch.arange(6.0).view(2, 3).T
    write_checkpoint(tmp_path, [("t", tensor)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_name_given_twice(tmp_path: Path):
    with pytest.raises(ValueError, match="tensor t0 was given twice"):
        write_checkpoint(tmp_path, [*tensors(1), *tensors(1)], shard_bytes=40)


def test_unwritable_file_is_the_machines_failure(tmp_path: Path):
    with pytest.raises(MachineError, match=r"shard-0.safetensors could not be written\n.*\n.*free some disk space"):
        write_checkpoint(tmp_path / "gone", tensors(1))
    with pytest.raises(MachineError, match=r"config.json could not be written"):
        write_config(tmp_path / "gone", LlamaConfig(), {}, torch.float16)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("config", "legacy"),
    [
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 123.0}), {"rope_theta": 123.0}),
        (LlamaConfig(rope_parameters=LLAMA3), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (GPTNeoXConfig(rotary_pct=0.5), {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 77.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
                }
            ),
            {"rope_theta": 77.0, "rope_local_base_freq": 55.0},
        ),
        (GPT2Config(), {}),
    ],
    ids=["llama", "llama3", "gpt-neox", "gemma3", "gpt2"],
)
def test_config(tmp_path: Path, config: PretrainedConfig, legacy: dict[str, Any]):
    config.architectures = ["SomeForCausalLM"]
    config._name_or_path = "/somewhere/private"
    before = config.to_dict()
    write_config(tmp_path, config, {"quant_method": "compressed-tensors"}, torch.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text())
    keys = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rope_scaling"}
    assert {key: written[key] for key in keys & set(written)} == legacy
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["architectures"] == ["SomeForCausalLM"]
    assert written["quantization_config"] == {"quant_method": "compressed-tensors"}
    assert "private" not in (tmp_path / "config.json").read_text()
    assert config.to_dict() == before
    read = AutoConfig.from_pretrained(tmp_path)
    assert getattr(read, "rope_parameters", None) == getattr(config, "rope_parameters", None)
    assert read.dtype == torch.bfloat16


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def test_staged_appears_when_complete(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with staged(out, overwrite=False) as folder:
        (folder / "a").write_text("new")
        assert folder.parent == out.parent and not out.exists()
    assert (out / "a").read_text() == "new"
    assert left_beside(out) == []


def test_staged_takes_an_empty_folder(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with staged(out, overwrite=False) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in out.iterdir()] == ["a"]
    assert left_beside(out) == []


def old_folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    return out


def test_staged_replaces(tmp_path: Path):
    out = old_folder(tmp_path)
    with staged(out, overwrite=True) as folder:
        (folder / "a").write_text("new")
        assert (out / "old").read_text() == "old"
    assert [path.name for path in out.iterdir()] == ["a"]
    assert left_beside(out) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_staged_leaves_nothing_when_it_fails(tmp_path: Path, error: type[BaseException]):
    out = old_folder(tmp_path)
    with pytest.raises(error), staged(out, overwrite=True) as folder:
        (folder / "a").write_text("half")
        raise error
    assert (out / "old").read_text() == "old"
    assert left_beside(out) == []


def test_staged_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = old_folder(tmp_path)
    rename = Path.rename

    def fail_at_the_new_one(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_new_one)
    with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True):
        pass
    assert (out / "old").read_text() == "old"
    assert left_beside(out) == []


def test_staged_does_not_replace_what_appeared_meanwhile(tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="already exists"), staged(out, overwrite=False):
        old_folder(tmp_path)
    assert (out / "old").read_text() == "old"
    assert left_beside(out) == []


def test_staged_spares_the_staging_folder_of_another_at_work_and_removes_what_others_left(tmp_path: Path):
    out = tmp_path / "out"
    for left in ("out.tmp-0123abcd", "out.old-0123abcd", "out.tmp-12345678"):
        (tmp_path / left).mkdir()
    (tmp_path / "out.tmp-12345678.lock").touch()
    (tmp_path / "out.tmp-abcdef01.lock").touch()
    with staged(out, False) as other:
        (other / "a").write_text("its own")
        with staged(out, False) as folder:
            (folder / "a").write_text("new")
        assert (other / "a").read_text() == "its own"
        shutil.rmtree(out)
    assert (out / "a").read_text() == "its own"
    assert left_beside(out) == []


def test_folders_that_someone_has_named_stay_beside_a_new_one(tmp_path: Path):
    out, own = tmp_path / "out", ["out.old-v1", "out.tmp-mine", "out.tmp-1", "out.old-12345678-copy", "out.lock"]
    for name in own:
        (tmp_path / name).mkdir()
    for overwrite in (False, True):
        with staged(out, overwrite) as folder:
            (folder / "a").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*own, "out"])


@pytest.mark.parametrize("inside", ["model", "model/deep/file.jsonl"])
def test_output_does_not_take_the_place_of_what_is_read(inside: str, tmp_path: Path):
    read = tmp_path / inside
    read.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for out in (tmp_path / "model", tmp_path / "link", tmp_path / "no" / ".." / "model"):
        with pytest.raises(OutputError, match=r"cannot be the output\n.*is read, and would be removed"):
            check_output(out, True, "org/name", read)
    check_output(tmp_path / "model" / "deep" / "out", True, tmp_path / "model")
    check_output(tmp_path / "mode", True, read)


def test_output_is_refused_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = old_folder(tmp_path)
    with pytest.raises(OutputError, match=r"out already exists\n.*not empty\n.*--overwrite"):
        check_output(out, overwrite=False)
    check_output(out, overwrite=True)
    with pytest.raises(OutputError, match=r"old is not a folder"):
        check_output(out / "old", overwrite=True)
    with pytest.raises(OutputError, match=r"cannot be created\n.*old is a file"):
        check_output(out / "old" / "below", overwrite=False)
    with pytest.raises(OutputError, match=r"cannot be used\n.*too long"):
        check_output(tmp_path / ("x" * 300), overwrite=False)
    monkeypatch.chdir(out)
    with pytest.raises(OutputError, match="contains the working directory"):
        check_output(tmp_path, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"cannot be created\n.*is not writable"):
        check_output(tmp_path / "new", overwrite=False)
    assert left_beside(out) == []
