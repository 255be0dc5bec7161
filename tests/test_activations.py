"""Hidden states on the device, in RAM or on disk: the same run, and nothing left behind."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import folder, recipe, text  # noqa: F401

import logitwise
from logitwise import activations
from logitwise.activations import Streams, choose_place
from logitwise.errors import MachineError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"polish": True, "polish_steps": 4, "final_blocks": 2},
        {"teacher_last": "quantized", "start": "gptq"},
        {"method": "gsq", "symmetric": True},
    ],
)
def test_where_they_are_changes_nothing(
    changes: dict[str, object],
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    made = {}
    for place in ("device", "cpu", "disk"):
        asked = recipe(text, steps=4, streams=place, **changes)
        logitwise.quantize(folder, tmp_path / place, asked, keep_run=True)
        made[place] = load_file(tmp_path / place / "model.safetensors")
        assert not list((tmp_path / f"{place}.run").glob("*.stream*"))
    for place in ("cpu", "disk"):
        assert all(torch.equal(made[place][name], tensor) for name, tensor in made["device"].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_on_disk_is_a_tensor_like_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    streams, values = Streams("disk", CPU, tmp_path / "new"), torch.randn(5, 3, 7).to(dtype)
    stream = streams.empty(values.shape, dtype)
    assert not list((tmp_path / "new").iterdir())
    stream[:] = values
    other = streams.copy(stream)
    stream[1:3] += 1
    assert torch.equal(other, values)
    assert torch.equal(stream[[0, 3, 4]], values[[0, 3, 4]])
    assert not torch.equal(stream[1:3], values[1:3])


def test_a_disk_without_room_is_said_before_anything_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match=r"activations cannot be kept in(.|\n)*No space left(.|\n)*fewer --rows"):
        Streams("disk", CPU, tmp_path).empty((4, 4), torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "asked", "size", "place"),
    [
        ("cpu", "auto", 40, "device"),
        ("cpu", "auto", 60, "disk"),
        ("cpu", "device", 60, "device"),
        ("cuda", "auto", 15, "device"),
        ("cuda", "auto", 25, "cpu"),
        ("cuda", "auto", 60, "disk"),
        ("cuda", "disk", 1, "disk"),
    ],
)
def test_they_are_where_they_leave_half_of_what_is_free(
    device: str, asked: str, size: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "free_memory", lambda of: {"cpu": 100, "cuda": 40}[of.type])
    assert choose_place(asked, size, torch.device(device)).value == place
