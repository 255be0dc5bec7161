"""A comparison as Markdown: what the terminal shows of it."""

import re
from collections.abc import Sequence
from typing import Any

from logitwise.report.sentences import megabytes, percent

Json = dict[str, Any]

KEY = (
    "KL: of full precision to the model, nats a token of full precision's own answers, ± one standard error over "
    "answers; flips: where the likeliest token is another, in brackets where full precision had decided; identical: "
    "greedy answers the same to the last token; ends: answers that come to their end"
)
SERVED = "; ≥: a lower bound, since a server names only its likeliest tokens; -: what a server does not say"


def summary_of(findings: Json) -> str:
    """The sentences, a table of the models, and how to read it."""
    told = "\n".join(f"{place}. {sentence}" for place, sentence in enumerate(findings["sentences"], start=1))
    columns = [
        "model",
        "size",
        "bits/w",
        "KL",
        "median",
        "99 %",
        "reverse KL",
        "top-1",
        "flips",
        "identical",
        "ends",
        "loops",
    ]
    scored = findings["models"][0]["tasks"] is not None
    columns += ["solved"] if scored else []
    rows = [_row(model, scored) for model in findings["models"]]
    noise = findings["noise"]
    rows.append(["full precision in bfloat16 (noise)", "", "", *_tokens(noise)] + [""] * (len(columns) - 9))
    served = any(model["served"] for model in findings["models"])
    return "\n\n".join([told, table(columns, rows), KEY + (SERVED if served else "")]) + "\n"


def _row(model: Json, scored: bool) -> list[str]:
    absent = "-" if model["served"] else ""
    bits = model["size"]["bits_per_weight"] if model["size"] else None
    size = megabytes(model) if model["size"] else absent
    cells = [model["name"], size, absent if bits is None else f"{bits:.2f}"]
    cells += _tokens(model["tokens"]) if model["tokens"] else [absent] * 6
    answers = model["answers"]
    cells += [percent(answers[name]) for name in ("identical", "ended", "loops")]
    return cells + ([percent(model["tasks"]["accuracy"])] if scored else [])


def _tokens(found: Json) -> list[str]:
    kl, flips = found["kl"], found["flips"]
    error, least = kl["mean"]["standard_error"], "≥ " if found["coarse"] else ""
    return [
        f"{least}{kl['mean']['mean']:.3g}" + ("" if error is None else f" ± {error:.1g}"),
        f"{least}{kl['median']:.2g}",
        f"{least}{kl['p99']:.3g}",
        f"{least}{found['reverse_kl']['mean']['mean']:.3g}",
        percent(found["top1"]["mean"]),
        f"{percent(flips['share']['mean'])} ({percent(flips['decided']['mean'])})",
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what a cell holds is text, not markup."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[re.sub(r"([\\|*_`<\[])", r"\\\1", cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
