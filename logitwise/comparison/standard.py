"""lm_eval's standard tasks on every model, and how each differs from full precision.

The models are handed over in memory, as `compare` loads them for its own answers; all else is lm_eval's: prompts, the
number of examples, no chat template, greedy or not, filters, metrics, standard errors. But log-probabilities are taken
in float32. One task of one model is a
finished part of the run folder.
"""

import copy
import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitwise.comparison.candidates import Candidate
from logitwise.comparison.contained import contained
from logitwise.comparison.findings import Json, as_json
from logitwise.comparison.harness import SEEDS, Harness, Item
from logitwise.comparison.written import Manner
from logitwise.errors import MachineError
from logitwise.machine import repeatable
from logitwise.measure.figure import FEWEST, bootstrap_interval
from logitwise.runfolder import RunFolder, chain
from logitwise.skeleton import load_whole
from logitwise.watch import Watcher

WRITTEN_AT_ONCE, READ_AT_ONCE = 16, 32
"""Requests of a batch, answered and read."""

LOGITS_AT_ONCE = 1 << 28
"""Logits of a batch that is read, fewer requests where they are long: lm_eval holds all of them, 1 GiB in float32."""


LOG_PROBABILITIES = "float32"

FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)
"""What a task may raise on one model's answers; memory and disk have their own words."""


@dataclass(frozen=True)
class Scored:
    """One task of one model.

    Args:
        record: `figures`, as lm_eval gives them, by "metric,filter"; `higher_is_better` by metric; `documents`.
        values: of each metric that has one number a document, in the documents' order, by "metric,filter".
    """

    record: Json
    values: dict[str, Float[Tensor, " documents"]]


@repeatable()
def score(
    harness: Harness,
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    manner: Manner,
    folder: RunFolder,
    watcher: Watcher,
) -> dict[str, Scored]:
    """What a model scores in each task, by the task's name; tasks that the folder has are read."""
    found: dict[str, Scored] = {}
    with _loaded(candidate, tokenizer, manner) as load:
        for item in harness.items:
            with watcher.stage(f"{candidate.name}: {item.name}", sum(map(_requests, item.tasks))) as stage:
                done = 0
                for task in item.tasks:
                    name, done = task.task_name, done + _requests(task)
                    key = chain(
                        "lm_eval",
                        model=candidate.digest,
                        task=name,
                        version=str(task.VERSION),
                        asked=harness.digests[name],
                        lm_eval=harness.version,
                        limit=harness.limit,
                        device=manner.device,
                        dtype=manner.dtype,
                    )
                    if not folder.has(key):
                        with contained() as held:
                            lm = load()
                            held.warned.clear()  # that it was handed a model
                            lm.set_cache_hook(SimpleNamespace(add_partial=lambda *_: stage.advance()))
                            try:
                                scored = _run(task, lm, harness.limit)
                            except FAILURES as error:
                                raise _failed(name, candidate, error) from error
                        for warning in held.sentences():
                            watcher.say(f"{candidate.name}, {name}: lm_eval warns: {warning}")
                        folder.save_tensors(key, scored.values, scored.record)
                    found[name] = Scored(folder.record(key), folder.load_tensors(key))
                    stage.reach(done)
    return found


def _failed(task: str, candidate: Candidate, error: Exception) -> MachineError:
    """What is said of a task that ran on made-up answers, and does not on a model's."""
    why = f"{type(error).__name__}: {(str(error).strip() or 'lm_eval gives no reason').splitlines()[0]}"
    remedy = "leave the task out, or correct it; what is finished is kept"
    return MachineError(f"lm_eval's task {task} failed with {candidate.name}", why, remedy)


@contextmanager
def _loaded(candidate: Candidate, tokenizer: PreTrainedTokenizerBase, manner: Manner) -> Iterator[Any]:
    """Gives what loads a model into lm_eval when it is first needed; it is freed at the end."""
    kept: list[Any] = []

    def load() -> Any:
        if not kept:
            from lm_eval.models.huggingface import HFLM

            device, dtype = torch.device(manner.device), getattr(torch, manner.dtype)
            model: PreTrainedModel = load_whole(candidate.source, device, dtype)
            own = copy.deepcopy(tokenizer)  # lm_eval sets its padding
            # Its default, the model's own type, moves a perplexity in bfloat16 by a tenth of what 4 bits do.
            kept.append(HFLM(pretrained=model, tokenizer=own, batch_size=1, softmax_dtype=LOG_PROBABILITIES))
        return kept[0]

    try:
        yield load
    finally:
        if kept:
            kept.clear()
            gc.collect()  # a model's modules refer to one another
            torch.cuda.empty_cache()


def _run(task: Any, lm: Any, limit: int | None) -> Scored:
    """One task of one model, set up and seeded as lm_eval's command does it."""
    import lm_eval

    name = task.task_name
    lm.batch_size_per_gpu = _batch(task, lm)
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    task.set_fewshot_seed(seed=SEEDS["few_shot"])
    found = lm_eval.evaluate(lm=lm, task_dict={"tasks": {name: task}}, limit=limit)
    figures = {key: value for key, value in found["results"][name].items() if "," in key}
    documents = int(found["n-samples"][name]["effective"])
    record = {
        "figures": {key: float(value) if _is_number(value) else value for key, value in figures.items()},
        "higher_is_better": found["higher_is_better"][name],
        "documents": documents,
    }
    values = {key: _by_document(found["samples"][name], *key.split(",", 1)) for key in figures if _is_metric(key)}
    return Scored(record, {key: one for key, one in values.items() if one is not None and len(one) == documents})


def _batch(task: Any, lm: Any) -> int:
    """Requests of a batch: by the longest, not by what memory is free, since batches decide how sums are rounded."""
    if any(request.request_type == "generate_until" for request in task.instances):
        return WRITTEN_AT_ONCE
    texts = ("".join(part for part in request.args if isinstance(part, str)) for request in task.instances)
    tokens: int = min(len(lm.tok_encode(max(texts, key=len))), lm.max_length)
    vocabulary: int = lm.model.config.get_text_config().vocab_size
    fit = LOGITS_AT_ONCE // (max(1, tokens) * vocabulary)
    return max(1, min(READ_AT_ONCE, fit))


def _requests(task: Any) -> int:
    return sum(request.repeats for request in task.instances)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _is_metric(key: str) -> bool:
    return not key.partition(",")[0].endswith("_stderr")


def _by_document(samples: Sequence[Json], metric: str, called: str) -> Float[Tensor, " documents"] | None:
    """A metric's number of each document; None where it is no number, as with a perplexity's sums."""
    values = [sample[metric] for sample in samples if sample["filter"] == called and metric in sample]
    if not all(_is_number(value) for value in values):
        return None
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@repeatable()  # lm_eval draws from the caller's generator wherever a task is asked for its name
def standard_findings(
    items: Sequence[Item], own: dict[str, Scored], original: dict[str, Scored] | None, seed: int
) -> list[Json]:
    """A model's figures in each task or group, with those of a group's parts.

    Args:
        own, original: what the model and full precision scored; None for full precision itself.
        seed: of the bootstrap.
    """
    return [_finding(item, own, original, seed) for item in items]


def _finding(item: Item, own: dict[str, Scored], original: dict[str, Scored] | None, seed: int) -> Json:
    figures, before = _figures(item, own), _figures(item, original) if original else {}
    better = {name: up for task in item.tasks for name, up in own[task.task_name].record["higher_is_better"].items()}
    metrics = []
    for key in filter(_is_metric, figures):
        metric, _, called = key.partition(",")
        error = figures.get(f"{metric}_stderr,{called}")
        differs = original is not None and _is_number(figures[key]) and _is_number(before[key])
        metrics.append(
            {
                "metric": metric,
                "filter": called,
                "value": figures[key] if _is_number(figures[key]) else None,
                "standard_error": error if _is_number(error) else None,
                "higher_is_better": better.get(metric),
                "difference": figures[key] - before[key] if differs else None,
                "interval": _interval(item, key, (own, original), (figures[key], before[key]), seed)
                if original and differs
                else None,
            }
        )
    return {
        "task": item.name,
        "documents": sum(own[task.task_name].record["documents"] for task in item.tasks),
        "metrics": [as_json(metric) for metric in metrics],
        "parts": standard_findings(item.parts, own, original, seed),
    }


def _figures(item: Item, scored: dict[str, Scored]) -> Json:
    """A task's figures, or a group's by lm_eval's own rule for it."""
    if not item.parts:
        figures: Json = scored[item.name].record["figures"]
        return figures
    leaves = {
        name: {**one.record["figures"], "sample_len": one.record["documents"], "name": name}
        for name, one in scored.items()
    }
    with contained():
        together = item.built.aggregate(leaves)
    return {key: value for key, value in together.items() if "," in key}


def _interval(
    item: Item, key: str, sides: Sequence[dict[str, Scored]], means: Sequence[float], seed: int
) -> tuple[float, float] | None:
    """The paired 95 % interval of a difference to full precision; None where the metric is no mean over documents.

    Args:
        sides, means: what the model and full precision scored, and the metric of each. A group's may be the mean of all
            documents or that of its tasks' means.
    """
    names = [task.task_name for task in item.tasks if key in sides[0][task.task_name].record["figures"]]
    if any(key not in side[name].values for name in names for side in sides):
        return None
    values = [[side[name].values[key] for name in names] for side in sides]
    count = sum(map(len, values[0]))
    for weights in ([1.0] * len(names), [count / (len(names) * len(one)) for one in values[0]]):
        own, original = (torch.cat([w * one for w, one in zip(weights, side, strict=True)]) for side in values)
        if count >= FEWEST and np.allclose([float(own.mean()), float(original.mean())], means, rtol=1e-6, atol=0):
            return bootstrap_interval(own - original, seed)
    return None


@repeatable()
def standard_conditions(harness: Harness) -> Json:
    """How the tasks were run: what a reader needs to compare their figures with others'."""
    return {
        "version": harness.version,
        "limit": harness.limit,
        "chat_template": False,
        "log_probabilities_dtype": LOG_PROBABILITIES,
        "seeds": SEEDS,
        "tasks": [
            {
                "task": item.name,
                "from": item.origin,
                "version": str(item.built.version if item.parts else item.tasks[0].VERSION),
                "few_shot": _same([task.config.num_fewshot for task in item.tasks]),
                "documents": sum(len(task.eval_docs) for task in item.tasks),
            }
            for item in harness.items
        ],
    }


def _same(values: Sequence[int]) -> int | None:
    return values[0] if len(set(values)) == 1 else None
