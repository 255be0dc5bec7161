"""Peak memory, the polish included, stays under the largest window's working set, the streams and a fixed part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from source_files import llama_config, random_model, save

MEASURE = """
import json, sys, torch
import logitwise
from logitwise.pipeline import quantize  # Python and torch are in the first figure
torch.set_num_threads(1)

def peak():  # ru_maxrss would count what the process that started this one had in memory
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

settings = dict(bits=3, group_size=64, rows=8, held_out=4, row_tokens=64, steps=1, batch=4, checks=1)
settings |= dict(polish=True, polish_steps=1)
recipe = logitwise.Recipe.load(None, **settings, calibration="text:" + sys.argv[3])
before = peak()
quantize(sys.argv[1], sys.argv[2], recipe)
print(json.dumps([before, peak()]))
"""
WIDTH, INNER = 384, 1024


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the hen met the man and the ant ate a net.\n\n" * 100, encoding="utf-8")
    return path


def peak(tmp_path: Path, text: Path, depth: int) -> tuple[int, int, int]:
    """Bytes before and at the peak of a run in a process of its own, and bytes of one block in float32."""
    config = llama_config(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=depth,
        head_dim=96,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    model = random_model(config)
    folder = save(model, tmp_path / f"deep{depth}", shard_size="20MB")
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    del model
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / f"out{depth}"), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after, block


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path, text: Path) -> None:
    before, shallow, block = peak(tmp_path, text, 3)
    _, deep, _ = peak(tmp_path, text, 23)
    streams = 2 * 12 * 64 * WIDTH * 4
    # One window: the weight, parameters of twice its size, their gradients and moments, and what autograd holds.
    working_set = 16 * block + streams
    assert deep - before < working_set + 200 * 2**20
    assert deep < working_set + int(1.5 * 2**30)
    # Twenty more blocks weigh 20 `block`; the allocator's own ups and downs are tens of MiB.
    assert deep - shallow < 20 * block * 0.25
