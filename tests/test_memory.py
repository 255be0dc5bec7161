"""Peak memory, the polish included, stays under the largest window's working set, the streams and a fixed part."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from statistics import mean

import psutil
import pytest
import torch
from source_files import llama_config, random_model, save

from logitwise import memory
from logitwise.errors import MachineError
from logitwise.memory import enough_memory, free_memory, only_new_collected, total_memory

MEASURE = """
import ctypes, json, sys, torch
import logitwise, logitwise.learnable, logitwise.polish, logitwise.watch
from logitwise.pipeline import quantize  # Python and torch are in the first figure
torch.set_num_threads(1)
for module in (logitwise.learnable, logitwise.polish):
    module.free_memory = lambda device: 0  # where there is memory for it, codes and activations of all blocks are kept

def memory(kind):  # ru_maxrss would count what the process that started this one had in memory
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

class Watching(logitwise.watch.Watcher):
    after = []  # each fit: what is resident
    def detail(self, sentence):
        trim(0)  # what the allocator holds back comes and goes by tens of MiB
        self.after.append(memory("VmRSS"))
        self.peak = memory("VmHWM")

trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)  # glibc's
settings = dict(bits=3, group_size=64, rows=8, held_out=4, row_tokens=64, steps=1, batch=4, checks=1)
settings |= dict(polish=True, polish_steps=1)
recipe = logitwise.Recipe.load(None, **settings, calibration="text:" + sys.argv[3])
before, watching = memory("VmHWM"), Watching()
quantize(sys.argv[1], sys.argv[2], recipe, watcher=watching)
print(json.dumps([before, watching.after, watching.peak, memory("VmHWM")]))
"""
DEPTH = 23
WIDTH, INNER = 384, 1024


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the hen met the man and the ant ate a net.\n\n" * 100, encoding="utf-8")
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_depth(tmp_path: Path, text: Path) -> None:
    config = llama_config(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        head_dim=96,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    model = random_model(config)
    folder = save(model, tmp_path / "deep", shard_size="20MB")
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    del model
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "out"), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, fitted, peak = json.loads(done.stdout.splitlines()[-1])
    assert len(after) == DEPTH + 1
    streams = 2 * 12 * 64 * WIDTH * 4
    # One window: the weight, parameters of twice its size, their gradients and moments, and what autograd holds.
    working_set = 16 * block + streams
    assert peak - before < working_set + 200 * 2**20
    assert peak < working_set + int(1.5 * 2**30)
    # Means of five fits, thirteen blocks apart; the first fits fill what is kept for good.
    assert mean(after[-6:-1]) - mean(after[5:10]) < 13 * block * 0.25
    # The polish holds the scales of all blocks, with moments; of their weights it holds one block's.
    assert peak - fitted < DEPTH * block * 0.25


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip().strip("/")
    inner = tmp_path / own
    inner.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    host = psutil.virtual_memory().total
    assert total_memory() == host
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert total_memory() == 1000
    assert free_memory(torch.device("cpu")) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert total_memory() == host


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_said_with_what_helps(error: Exception) -> None:
    with pytest.raises(MachineError, match=r"is not enough(.|\n)*do:   buy more"), enough_memory("buy more"):
        raise error


@pytest.mark.parametrize(
    "error", [NotImplementedError("no"), torch.linalg.LinAlgError("singular"), RuntimeError("other")]
)
def test_other_errors_are_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), enough_memory("buy more"):
        raise error


class Cycle:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_only_what_was_made_inside_is_looked_at() -> None:
    before = gc.get_freeze_count()
    kept = Cycle()
    with only_new_collected():
        old, new = weakref.ref(kept), weakref.ref(Cycle())
        del kept
        gc.collect()
        assert new() is None
        assert old() is not None  # it was there before, and is not looked at
        with only_new_collected():
            assert gc.get_freeze_count() > before
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() <= before  # those that Python itself begins with are not put back
    gc.collect()
    assert old() is None


def test_what_python_itself_has_frozen_is_no_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)  # as Python 3.12 begins
    kept = Cycle()
    with only_new_collected():
        old = weakref.ref(kept)
        del kept
        gc.collect()
        assert old() is not None
    gc.collect()
    assert old() is None


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        with only_new_collected():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
