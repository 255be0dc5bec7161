"""A whole run on a model of a large shape: time and where it goes, memory, and the rate of its arithmetic.

    python benchmarks/large.py --out results.json [--shape llama-3.1-8b] [--blocks 4] [--rows 128] [--set key=value ...]
    python benchmarks/large.py --out growth.json --grow
    python benchmarks/large.py --out several.json --compiled --processes 1 2

The model has random weights, its shape's head and embedding, and `--blocks` of its blocks; it is written to disk first,
in shards. Calibration rows are random tokens. The run is a process of its own, whose memory is its own at the most: its
resident set, and on a GPU its tensors. Parts of a run are timed by waiting for the device at their ends: they add
up. A step's time is the mean over a fit, its checks on held-out rows included.

Arithmetic of a step: a token costs 2 operations for each weight of the block going forward and 4 going backward (2 for
those that read the block's input, which needs no gradient), and 2 d s and 5 d s for causal attention of width d over s
positions; in the last fit 6 for each weight of the head (the teacher's logits, the student's, the gradient of its
hidden states). What a quantizer does to a weight is not counted. The card's own rate is that of a product of two
bfloat16 matrices of 8,192 x 8,192, in the same process. A digest of the checkpoint tells whether two runs gave the
same. --compiled compiles as a run over all of a model's blocks does, where these few would not pay for it. With several
--processes the run is theirs, as torchrun starts them, each on a GPU of its own; figures are those of the first.

--grow changes one thing at a time (blocks, rows, hidden size, vocabulary) beside one middle shape, in short runs of one
process, after one that is not counted.
"""

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lfq_cost import SHAPES, RandomSource
from processes import about, peak_ram, save
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

import logitwise
from logitwise import fused, pipeline, stream
from logitwise.calibration.rows import Rows
from logitwise.fit import Window
from logitwise.launch import rank, started
from logitwise.recipe import Recipe, parse_settings
from logitwise.runfolder import RunFolder
from logitwise.watch import Stage, Watcher

CUDA = torch.cuda.is_available()
MIDDLE = dict(hidden=2048, blocks=2, rows=64, vocabulary=32768)
"""What `--grow` starts from; heads of 128, an MLP 3.5 times as wide."""
GROWN: dict[str, list[int]] = {
    "blocks": [4, 8],
    "rows": [32, 128],
    "hidden": [1024, 4096],
    "vocabulary": [8192, 131072],
}
RUN = ["bits=3", "group_size=128", "steps=200", "batch=8", "row_tokens=2048", "held_out=8"]
SHORT = ["bits=3", "group_size=128", "steps=40", "batch=8", "row_tokens=1024", "held_out=8"]
WARM = 20


def main() -> None:
    """One run and its parts, or one for each point of the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys, as key=value")
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="a run by so many, and by so many")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.grow and given.processes != [1]:
        parser.error("--grow is by one process")
    if given.only:
        made = run(**json.loads(given.only))
        if rank() == 0:
            save(given.out, made)
        return
    found: list[dict[str, Any]] = []
    for number, point in enumerate(growth(given) if given.grow else [of_shape(given)]):
        with tempfile.TemporaryDirectory() as temporary:
            point["folder"] = temporary
            write_model(config_of(point["config"]), Path(temporary) / "model")
            for processes in given.processes:
                made = run(**point) if given.grow else in_processes(processes, point)
                if number or not given.grow:
                    found.append(made)
                    save(given.out, {**about("cuda" if CUDA else "cpu"), "results": found})
                    show(made)


def in_processes(count: int, point: dict[str, Any]) -> dict[str, Any]:
    """A run of so many processes, which torchrun starts where there are several."""
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    place = Path(point["folder"]) / "found.json"
    own = [__file__, "--out", str(place), "--only", json.dumps(point)]
    subprocess.run([sys.executable, *starter, *own], check=True)
    return dict(json.loads(place.read_text()))


def of_shape(given: argparse.Namespace) -> dict[str, Any]:
    """The run that is asked for."""
    about = {"rows": given.rows, "settings": RUN + given.set, "compiled": given.compiled}
    return {"config": shape_of(given.shape, given.blocks), **about}


def growth(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The middle shape, and those that differ from it in one thing."""
    middle = ("blocks", MIDDLE["blocks"])
    for name, value in [middle, middle, *((n, value) for n in GROWN for value in GROWN[n])]:
        at = {**MIDDLE, name: value}
        config = dict(
            hidden_size=at["hidden"],
            intermediate_size=7 * at["hidden"] // 2,
            num_attention_heads=at["hidden"] // 128,
            num_key_value_heads=max(1, at["hidden"] // 512),
            vocab_size=at["vocabulary"],
            num_hidden_layers=at["blocks"],
        )
        yield {"config": config, "rows": at["rows"], "settings": SHORT + given.set, "varies": name, "at": at}


def shape_of(name: str, blocks: int | None = None) -> dict[str, Any]:
    """What a config has of a shape, all its blocks or so many of them."""
    shape = dict(SHAPES[name])
    depth = shape.pop("depth")
    return {**shape, "num_hidden_layers": depth if blocks is None else blocks}


def config_of(shape: dict[str, Any]) -> LlamaConfig:
    """The config of a model of this shape."""
    return LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def show(found: dict[str, Any]) -> None:
    """A line, then one for each part."""
    device, ram, rate = found["device_memory"] / 2**30, found["ram"] / 2**30, found["rate"] / 1e12
    print(
        f"{found['at'] or 'run'}, processes {found['processes']}: {found['seconds']:.1f} s, device {device:.2f} GiB, "
        f"RAM {ram:.2f} GiB, bf16 product {rate:.0f} TFLOP/s, {found['digest']}"
    )
    for name, part in found["parts"].items():
        print(f"    {name}: {part:.1f} s")
    for fit in found["fits"]:
        share = fit["operations"] / fit["step"] / found["rate"]
        of = f"{share:.1%} of that rate, loss {fit['first_loss']:.6g} to {fit['last_loss']:.6g}"
        print(f"    {fit['name']}: {1e3 * fit['step']:.1f} ms a step, {of}")
    sys.stdout.flush()


def run(
    config: dict[str, Any],
    rows: int,
    settings: list[str],
    folder: str,
    compiled: bool = False,
    varies: str | None = None,
    at: dict[str, int] | None = None,
) -> dict[str, Any]:
    """One run, in this process."""
    if compiled:
        fused.SECONDS_TO_COMPILE = 0
    if CUDA and started() > 1:
        torch.cuda.set_device(rank())
    made, model = config_of(config), Path(folder) / "model"
    recipe = Recipe.load(**parse_settings(settings), rows=rows)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(made.vocab_size, (rows + (recipe.held_out or 0), recipe.row_tokens + 1), generator=generator)
    data = Rows(text[:, :-1], text[:, 1:], torch.ones(len(text), recipe.row_tokens))
    rate = product_rate()
    parts: dict[str, float] = defaultdict(float)
    clock = Clock()
    if CUDA:
        gc.collect()  # of the run before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ended_by_device(parts):
        began = time.perf_counter()
        result = logitwise.quantize(model, Path(folder) / "out", recipe, rows=data, overwrite=True, watcher=clock)
        seconds = time.perf_counter() - began
    if rank():  # the first alone is told how far it is
        return {}
    parts["else"] = seconds - sum(parts.values())
    tokens = recipe.batch * recipe.row_tokens
    fits = []
    for window, times in zip(result.report["windows"], clock.fits, strict=True):
        steps = times[WARM : recipe.steps]
        step = (steps[-1] - steps[0]) / (len(steps) - 1)
        last = window["objective"] != "mse"
        name = f"block {window['blocks'][0] + 1} by {window['objective']}"
        losses = {"first_loss": window["losses"][0], "last_loss": window["losses"][-1]}
        of_rank = tokens * operations(made, recipe, last) / started()
        fits.append({"name": name, "step": step, "operations": of_rank, **losses})
    return {
        "config": config,
        "rows": rows,
        "settings": settings,
        "compiled": compiled,
        "varies": varies,
        "at": at,
        "processes": started(),
        "held_out_kl": result.held_out_kl,
        "seconds": seconds,
        "parts": dict(parts),
        "fits": fits,
        "rate": rate,
        "ram": peak_ram(),
        "device_memory": torch.cuda.max_memory_allocated() if CUDA else 0,
        "weights": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "digest": digest(Path(folder) / "out"),
    }


def write_model(config: LlamaConfig, out: Path) -> None:
    """A folder of random weights, a shard for each block and one for what is outside of them."""
    source = RandomSource(config)
    shards: dict[str, list[str]] = defaultdict(list)
    for name in source.names():
        parts = name.split(".")
        shards[f"block-{parts[2]}" if parts[1] == "layers" else f"outside-{len(shards)}"].append(name)
    out.mkdir()
    config.save_pretrained(out)
    core = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")
    )  # rows are given: nothing is read by it
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(out)
    for shard, names in shards.items():
        save_file({name: source.read(name).cpu() for name in names}, out / f"{shard}.safetensors", {"format": "pt"})
    weight_map = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def digest(folder: Path) -> str:
    """Of a checkpoint's bytes: the same for the same settings, wherever hidden states are kept."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:16]


def operations(config: LlamaConfig, recipe: Recipe, last: bool) -> float:
    """Operations a token of a step."""
    d, width = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    first = d * d + 2 * d * width
    rest = d * d + 3 * d * config.intermediate_size
    head = 6 * d * config.vocab_size if last else 0
    return float(4 * first + 6 * rest + 7 * d * recipe.row_tokens + head)


def product_rate(size: int = 8192 if CUDA else 1024, repeats: int = 20) -> float:
    """Operations a second of a product of two square bfloat16 matrices."""
    a = torch.randn(size, size, device="cuda" if CUDA else "cpu").bfloat16()
    for count in (3, repeats):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            a @ a
        wait()
    return repeats * 2 * size**3 / (time.perf_counter() - began)


class Clock(Watcher):
    """Notes when the steps of each fit end, without waiting for them: over many steps that is their time."""

    def __init__(self) -> None:
        self.fits: list[list[float]] = []

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[Stage]:
        began = time.perf_counter()
        yield Steps(self.fits) if title == "Fitting blocks" else Stage()
        print(f"{title}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    def detail(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)


class Steps(Stage):
    """A fit begins with a detail and goes on with steps."""

    def __init__(self, fits: list[list[float]]) -> None:
        self.fits = fits

    def advance(self, units: float = 1, detail: str = "") -> None:
        if detail:
            self.fits.append([])
        elif units:
            self.fits[-1].append(time.perf_counter())


@contextmanager
def ended_by_device(parts: dict[str, float]) -> Iterator[None]:
    """Adds up the time of a run's parts, the device's work included; a part inside another counts as its own."""
    running: list[float] = []

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            began = time.perf_counter()
            running.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                wait()
                seconds, inside = time.perf_counter() - began, running.pop()
                parts[name] += seconds - inside
                if running:
                    running[-1] += seconds

        return run

    places = [
        (pipeline, "check", "checking the model, proving the replay"),
        (pipeline, "try_memory", "trying the last fit for its memory"),
        (Window, "__init__", "reading blocks"),
        (Window, "advance", "rows through blocks, without gradients"),
        (stream.Walk, "_start", "starts"),
        (stream, "fit", "steps"),
        (stream, "measure", "held-out KL"),
        (RunFolder, "save", "keeping fits"),
        (pipeline, "write", "writing, reading back"),
    ]
    own = [(place, name, getattr(place, name)) for place, name, _ in places]
    for (place, name, call), (_, _, title) in zip(own, places, strict=True):
        setattr(place, name, timed(title, call))
    try:
        yield
    finally:
        for place, name, call in own:
            setattr(place, name, call)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
