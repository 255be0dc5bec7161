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
STANDARD = (
    "by lm_eval {version}, {documents}, no chat template; ↑ higher is better, ↓ lower; ± its standard error over "
    "documents; in brackets the difference to full precision and, where the metric is a mean over documents, its 95 % "
    "interval, paired by them"
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
    parts = [told, table(columns, rows), KEY + (SERVED if served else "")]
    if findings["conditions"]["lm_eval"]:
        parts += _standard(findings)
    return "\n\n".join(parts) + "\n"


def _standard(findings: Json) -> list[str]:
    """lm_eval's tasks: a line a metric, a column a model; and how to read it."""
    models, made = findings["models"], findings["conditions"]["lm_eval"]
    rows = []
    for place, entry in enumerate(models[0]["lm_eval"]):
        for index, metric in enumerate(entry["metrics"]):
            of_each = [model["lm_eval"][place]["metrics"][index] if model["lm_eval"] else None for model in models]
            rows.append([entry["task"], f"{entry['documents']:,}", _metric(metric), *map(_score, of_each)])
    documents = f"the first {made['limit']:,} documents of each task" if made["limit"] else "all documents"
    columns = ["task", "documents", "metric", *(model["name"] for model in models)]
    return [table(columns, rows), STANDARD.format(version=made["version"], documents=documents)]


def _metric(found: Json) -> str:
    called = "" if found["filter"] == "none" else f", {found['filter']}"
    way = {True: " ↑", False: " ↓", None: ""}[found["higher_is_better"]]
    return f"{found['metric']}{called}{way}"


def _score(found: Json | None) -> str:
    """A metric's value, its error, and how it differs."""
    if found is None or found["value"] is None:
        return "-"
    error, more, interval = (found[name] for name in ("standard_error", "difference", "interval"))
    text = _digits(found["value"], 4) + ("" if error is None else f" ± {_digits(error, 2)}")
    if more is None:
        return text
    ends = "" if interval is None else f": {' to '.join(map(_signed, interval))}"
    return f"{text} ({_signed(more)}{ends})"


def _digits(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _digits(value, 2)


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
