"""One model beside full precision as JSON values: what the page, the summary and other programs read.

`report/compare.schema.json` describes them. A figure is {mean, standard_error}; what cannot be told is null.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from statistics import mean, median
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from logitwise.comparison.served import Served
from logitwise.comparison.teacher import Teacher
from logitwise.comparison.written import Answers
from logitwise.measure.answers import THINK_MARKERS, first_different, loops, places, repeated, survival, thinking_closes
from logitwise.measure.bins import CONFIDENCE_EDGES, growth, in_bins, position_edges
from logitwise.measure.confidence import calibration, forking, turning_ids
from logitwise.measure.divergence import Divergence
from logitwise.measure.figure import Figure, exponential, mean_over_units, paired_shares, spread
from logitwise.measure.flips import DECIDED, Flips, flips

CONTEXT = 16  # tokens shown before a flipped one

Json = dict[str, Any]


def token_findings(
    found: Divergence,
    teacher: Teacher,
    ends: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    coarse: Json | None = None,
) -> Json:
    """A model's token probabilities on full precision's answers.

    Args:
        found: the model beside full precision.
        teacher: the tokens that were measured.
        ends: the tokens that end an answer.
        coarse: how much of a model's probabilities is known, where KL is a lower bound for want of the rest.
    """
    unit, position = teacher.answer, teacher.position
    lengths = torch.bincount(unit).tolist()
    edges = position_edges(lengths)
    nll = mean_over_units(-found.student_written.clamp(min=1e-38).log(), unit)
    forks = forking(found.entropy)
    turns = torch.isin(teacher.written, turning_ids(tokenizer))
    where = {"all": None, "low_entropy": ~forks, "high_entropy": forks, "turns": turns}
    figures: Json = as_json(
        {
            "tokens": len(unit),
            "coarse": coarse,
            "kl": {**_spread(found.kl), "mean": mean_over_units(found.kl, unit)},
            "reverse_kl": {**_spread(found.reverse_kl), "mean": mean_over_units(found.reverse_kl, unit)},
            "top1": mean_over_units(found.agrees, unit),
            "perplexity": exponential(nll),
            "kl_by_confidence": in_bins(found.kl, unit, found.teacher_confidence, CONFIDENCE_EDGES),
            "kl_by_position": in_bins(found.kl, unit, position, edges),
            "top1_by_position": in_bins(found.agrees, unit, position, edges),
            "growth": dict(zip(("first", "second", "difference"), growth(found.kl, unit, position), strict=True))
            if max(lengths) > 1
            else None,
            "flips": _flips(flips(found, unit), found, teacher, tokenizer),
            "confidence": {name: calibration(found, unit, at) for name, at in where.items()},
            "endings": {
                "turn": _probabilities(found, torch.isin(teacher.written, torch.tensor(list(ends)))),
                "thinking": _probabilities(found, _closings(teacher, tokenizer)),
            },
        }
    )
    return figures


def _spread(values: torch.Tensor) -> Json:
    return asdict(spread(values))


def _flips(made: Flips, found: Divergence, teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> Json:
    """The share that flips, and the worst with what stood before them."""
    worst = []
    counted = (teacher.rows.weights > 0).nonzero()
    for index in made.worst.tolist():
        row, column = counted[index].tolist()
        before = teacher.rows.ids[row, max(0, column + 1 - CONTEXT) : column + 1].tolist()
        worst.append(
            {
                "answer": row,
                "position": int(teacher.position[index]),
                "before": tokenizer.decode(before),
                "original": tokenizer.decode([int(found.teacher_token[index])]),
                "original_probability": float(found.teacher_confidence[index]),
                "model": tokenizer.decode([int(found.student_token[index])]),
                "model_probability": float(found.student_confidence[index]),
                "margin": float(found.margin[index]),
            }
        )
    figures = {name: getattr(made, name) for name in ("share", "decided", "margin", "by_margin")}
    return {**figures, "decided_margin": DECIDED, "worst": worst}


def _closings(teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Where full precision closes a thinking block: at the first token of what closes it, [tokens]."""
    written, where = teacher.written.tolist(), torch.zeros(len(teacher.written), dtype=torch.bool)
    for closing in THINK_MARKERS.values():
        where[places(written, tokenizer.encode(closing, add_special_tokens=False))] = True
    return where


def _probabilities(found: Divergence, where: torch.Tensor) -> Json | None:
    """The mean probability that each side gives to what full precision writes at some positions."""
    if not where.any():
        return None
    original, model = (float(side[where].mean()) for side in (found.teacher_written, found.student_written))
    return {"places": int(where.sum()), "original": original, "model": model}


def answer_findings(
    own: Answers, original: Answers, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Json:
    """What becomes of a model's greedy answers, beside full precision's to the same prompts."""
    pairs = list(zip(own.ids, original.ids, strict=True))
    first = [first_different(one, other) for one, other in pairs]
    lengths = [len(ids) for ids in own.ids]
    texts = [str(tokenizer.decode(ids)) for ids in own.ids]
    closes = [thinking_closes(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    thought = [closed for closed in closes if closed is not None]
    differing = [index for index in first if index is not None]
    looping = [loops(ids) for ids in own.ids]
    return {
        "count": len(first),
        "identical": mean(index is None for index in first),
        "first_different_median": median(differing) if differing else None,
        "survival": survival(first, max(len(ids) for ids in original.ids)),
        "tokens": {"mean": mean(lengths), "median": median(lengths)},
        "ended": mean(own.ended),
        "ended_interval": paired_shares(own.ended, original.ended)[1],
        "loops": mean(looping),
        "loops_interval": paired_shares(looping, [loops(ids) for ids in original.ids])[1],
        "repeated": mean(repeated(ids) for ids in own.ids),
        "thinking": {"opened": len(thought), "closed": mean(thought)} if thought else None,
    }


def served_findings(served: Served) -> Json:
    """How a served model was asked."""
    return {
        "address": served.address,
        "model": served.model,
        "prompts": served.prompts,
        "likeliest": served.likeliest if served.log_probabilities else None,
        "answer_tokens_by": "server" if served.says_ids else "text",
    }


def side_by_side(
    original: Answers,
    references: Sequence[Answers],
    others: Sequence[Answers],
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Json]:
    """Each prompt with full precision's answer and the others', split where they first differ from it.

    Args:
        references: full precision's answers as each of the others is compared with them.
    """
    found = []
    for index, prompt in enumerate(prompts):
        models = []
        for reference, other in zip(references, others, strict=True):
            first = first_different(other.ids[index], reference.ids[index])
            same = str(tokenizer.decode(other.ids[index][:first], skip_special_tokens=True))
            whole = _text(other, index, tokenizer)
            if not whole["text"].startswith(same):  # a character whose bytes are tokens of their own
                same = same.rstrip("\ufffd")
            split = {"same": same, "rest": whole["text"][len(same) :], "first_different": first}
            models.append({**split, "tokens": whole["tokens"], "ended": whole["ended"]})
        found.append({"prompt": prompt, "original": _text(original, index, tokenizer), "models": models})
    return found


def _text(answers: Answers, index: int, tokenizer: PreTrainedTokenizerBase) -> Json:
    ids = answers.ids[index]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"text": text, "tokens": len(ids), "ended": answers.ended[index]}


def as_json(value: Any) -> Any:
    """A finding in JSON's own types: figures by their names, floats to six digits, NaN and infinity as null."""
    if isinstance(value, Figure):
        return {"mean": as_json(value.mean), "standard_error": as_json(value.error)}
    if is_dataclass(value) and not isinstance(value, type):
        return {name: as_json(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
