"""What `plan` says beside what then happens: time, memory and size of whole runs.

    python benchmarks/plan_against_run.py --models MODEL [MODEL ...] --out FILE.json [--set key=value ...]
    python benchmarks/plan_against_run.py --made-up SHAPE [SHAPE ...] --tokenizer MODEL --out FILE.json [--folder WORK]

Each model is planned and then quantized, each in a process of its own. Models of --made-up have random weights, and
text is written with another's tokenizer. A line says what was planned as a share of what happened. Memory is that of
the process at most: its resident set, and on a GPU its tensors. In a --folder the models stay, with what was found: the
same command goes on with what is missing.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from large import config_of, shape_of, write_model
from lfq_cost import SHAPES
from processes import about, peak_ram, save

import logitwise
from logitwise.planning import plan
from logitwise.recipe import Recipe, parse_settings
from logitwise.source import open_source
from logitwise.watch import Stage, Watcher

SHARED = ("size", "ram", "device_memory", "seconds")
QUICK = ["steps=30", "steps_last=60", "batch=4", "rows=64", "held_out=16", "row_tokens=256", "bits=3", "group_size=64"]


def main() -> None:
    """Plans and runs, a model after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--made-up", nargs="+", choices=SHAPES, default=[])
    parser.add_argument("--tokenizer", type=Path, help="a model whose tokenizer those of --made-up have")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="a temporary one by default")
    parser.add_argument("--set", nargs="*", default=QUICK, help="recipe keys of every run, as key=value")
    parser.add_argument("--only", choices=(PLANNED, HAPPENED), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        (model,) = given.models
        save(given.out, FIND[given.only](model, Recipe.load(**parse_settings(given.set))))
        return
    if not given.models and not given.made_up:
        parser.error("give --models or --made-up")
    if given.made_up and not given.tokenizer:
        parser.error("--made-up needs --tokenizer")
    found: list[dict[str, Any]] = []
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.mkdir(exist_ok=True)
        for model in [*given.models, *(made_up(shape, given.tokenizer, place) for shape in given.made_up)]:
            both = {name: in_process(model, name, given.set, place) for name in FIND}
            planned, happened = both[PLANNED], both[HAPPENED]
            shares = {key: planned[key] / happened[key] for key in SHARED if planned[key]}
            found.append({"model": model.name, **both, "shares": shares})
            save(given.out, {**about("cuda" if torch.cuda.is_available() else "cpu"), "results": found})
            print(f"{model.name}: " + ", ".join(f"{key} {share:.2f}" for key, share in shares.items()), flush=True)


def made_up(shape: str, like: Path, place: Path) -> Path:
    """A folder with a model of random weights, if it is not there yet."""
    out = place / like.name / shape
    whole = out / "whole"
    if not whole.exists():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        write_model(config_of(shape_of(shape)), out)
        open_source(like).tokenizer().save_pretrained(out)
        torch.cuda.empty_cache()  # a plan sees what is free
        whole.touch()
    return out


def in_process(model: Path, name: str, settings: list[str], place: Path) -> dict[str, Any]:
    """What a process of its own finds, if it is not known yet."""
    asked = hashlib.sha256(json.dumps([str(model.resolve()), settings]).encode()).hexdigest()[:8]
    file = place / f"{model.name}-{asked}-{name}.json"
    if not file.exists():
        own = ["--models", str(model), "--out", str(file), "--only", name, "--set", *settings]
        subprocess.run([sys.executable, __file__, *own], check=True)
    return dict(json.loads(file.read_text()))


def planned(model: Path, recipe: Recipe) -> dict[str, Any]:
    """What `plan` says."""
    said = plan(model, recipe)
    parts = {"size": said.size, "ram": said.ram, "device_memory": said.device_memory}
    return {**parts, "seconds": sum(said.seconds.values()), "of_parts": said.seconds}


def happened(model: Path, recipe: Recipe) -> dict[str, Any]:
    """What a run took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        stages = Stages()
        result = logitwise.quantize(model, out, recipe, watcher=stages)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        of_parts = {"fits": [window["seconds"] for window in result.report["windows"]], "stages": stages.took}
    memory = {"ram": peak_ram()}
    memory["device_memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"size": size, **memory, "seconds": time.monotonic() - began, "of_parts": of_parts}


class Stages(Watcher):
    """Notes what each stage of a run takes, in seconds."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[Stage]:
        began = time.monotonic()
        yield Stage()
        self.took[title] = round(time.monotonic() - began, 3)


PLANNED, HAPPENED = "planned", "happened"
FIND = {PLANNED: planned, HAPPENED: happened}

if __name__ == "__main__":
    main()
