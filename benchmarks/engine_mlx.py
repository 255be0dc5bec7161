"""Loads MLX checkpoints by mlx-lm and compares its log-probabilities with those of transformers in float32.

Run it with logitwise's Python; --python names that of an environment with mlx[cpu] and mlx-lm, which needs no torch.
Without checkpoints it writes tiny random Llamas on many grids, and one whose zero points are off by one, which must
miss the gate. The weights that transformers computes with are logitwise's own reading of each checkpoint. The gate is
on mlx-lm in float32; figures "as loaded" are of the types in the file, where bfloat16 norms and embeddings round more.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from logitwise.formats import FORMATS
from logitwise.formats.checkpoint import write_checkpoint, write_config
from logitwise.grid import Grid, codes_of, freeze, scale_of_range, split
from logitwise.source import open_source

FORMAT = FORMATS["mlx"]
GATE = 1e-4
TEXT = (
    "The tides follow the moon. Twice a day the sea comes up the beach, and twice it goes back, because the Moon pulls"
)
BY_MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model

for line in sys.stdin:
    asked = json.loads(line)
    model, _ = load_model(Path(asked["folder"]))
    ids = mx.array([asked["ids"]])
    found = []
    for dtype in (None, mx.float32):
        if dtype is not None:
            model.set_dtype(dtype)  # activations too; codes stay
        logits = model(ids)[0, :-1].astype(mx.float32)
        chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found.append(mx.take_along_axis(chances, ids[0, 1:, None], axis=-1)[:, 0].tolist())
    print(json.dumps(found), flush=True)
"""


def main() -> None:
    """Prints one line of JSON for each checkpoint; exits with 1 where one misses the gate, or a wrong one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that holds mlx-lm")
    parser.add_argument("checkpoints", type=Path, nargs="*")
    given = parser.parse_args()
    failed = False
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [given.python, "-c", BY_MLX], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as engine,
    ):
        assert engine.stdin is not None
        assert engine.stdout is not None
        cases = ((path.name, path, path) for path in given.checkpoints) if given.checkpoints else tiny(Path(folder))
        for name, right, loaded in cases:
            ids = tokens(right)
            ours = by_transformers(right, ids)
            engine.stdin.write(json.dumps({"folder": str(loaded), "ids": ids}) + "\n")
            engine.stdin.flush()
            answer = engine.stdout.readline()
            if not answer:
                raise SystemExit(f"mlx-lm failed on {name}")
            as_loaded, difference = (torch.tensor(json.loads(answer)) - ours).abs()
            failed |= (float(difference.max()) <= GATE) is not (right == loaded)
            figures = {
                "largest": float(difference.max()),
                "mean": float(difference.mean()),
                "largest_as_loaded": float(as_loaded.max()),
                "mean_as_loaded": float(as_loaded.mean()),
                "nll": -float(ours.mean()),
            }
            print(json.dumps({"checkpoint": name, "tokens": len(ours), **figures}), flush=True)
        engine.stdin.close()
    raise SystemExit(int(failed))


def tokens(folder: Path) -> list[int]:
    """The text by the checkpoint's tokenizer; random ids where it has none."""
    source = open_source(folder)
    if (folder / "tokenizer_config.json").exists():
        ids: list[int] = source.tokenizer()(TEXT)["input_ids"]
        return ids
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, source.config.vocab_size, (48,), generator=generator).tolist()


@torch.no_grad()
def by_transformers(folder: Path, ids: list[int]) -> Tensor:
    """Log-probabilities of each token after the first, the weights read by logitwise."""
    source = open_source(folder)
    for key in FORMAT.config_keys:
        delattr(source.config, key)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


def tiny(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Names and folders of tiny models: what is compared, and what mlx-lm loads."""
    grids = [Grid(bits, size, True) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)]
    grids += [Grid(4, 64, True, torch.bfloat16), Grid(4, 128, True, torch.float32)]
    grids += [Grid(bits, size, False, torch.float32) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)]
    for place, grid in enumerate(grids):
        path = write(folder / str(place), [grid])
        yield str(grid), path, path
    for symmetric in (True, False):
        mixed = [Grid(bits, size, symmetric, torch.float32) for bits, size in ((4, 64), (2, 32), (8, 128), (3, 64))]
        kind = "symmetric" if symmetric else "asymmetric"
        path = write(folder / kind, mixed)
        yield f"4, 2, 8 and 3 bits, {kind}", path, path
    wrong = shutil.copytree(path, folder / "wrong")
    stored = load_file(wrong / "model.safetensors")
    for name in stored:
        if name.endswith(".biases"):
            stored[name] -= stored[name.replace(".biases", ".scales")]
    save_file(stored, wrong / "model.safetensors", {"format": "mlx"})
    yield "the last one with zero points off by one: must miss the gate", path, wrong


def write(folder: Path, grids: list[Grid]) -> Path:
    """A random Llama, its projections rounded to nearest on the grids in turn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},  # a reader's default would show
    )
    model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    state, on = dict(model.state_dict()), {}
    for place, name in enumerate([name for name in state if "_proj" in name]):
        module, grid, weight = name.removesuffix(".weight"), grids[place % len(grids)], state.pop(name)
        grouped = split(weight, grid.groups(weight.shape[1]))
        scale, zero = scale_of_range(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), grid)
        on[module] = grid
        state |= FORMAT.tensors(module, freeze(codes_of(weight, scale, zero, grid), scale, zero, grid))
    folder.mkdir()
    write_checkpoint(folder, state.items(), written_for=FORMAT.written_for)
    quantization = FORMAT.quantization_config(on, ["lm_head"])
    write_config(folder, config, quantization, torch.float32, FORMAT.config_keys)
    return folder


if __name__ == "__main__":
    main()
