"""Five sentences at the head of a comparison, for a reader who knows nothing of KL: which, what, where, whether, do.

All are made from the findings alone (compare.schema.json), by rules that are written here and nowhere else.
"""

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

OVERTURNED = 0.01
"""Share of decided tokens that flip that flip, of all, from which a model is said to overturn decisions."""

MOST = 0.5
"""Share of full precision's answers that must come to their end, if problems solved are to say something."""


def sentences(findings: Json) -> list[str]:
    """The five sentences."""
    original, *others = findings["models"]
    told = sorted((m for m in others if m["tokens"]), key=lambda model: float(model["tokens"]["kl"]["mean"]["mean"]))
    untold = [model for model in others if not model["tokens"]]
    ranked = told + untold
    return [
        nearest(told, findings["noise"]) if told else answered_alone(untold),
        " ".join(filter(None, [lost(original, ranked), cut_off(original), standard_tasks(ranked)])),
        where(told) if told else first_differences(untold),
        endings(original, ranked),
        advice(original, ranked),
    ]


def answered_alone(untold: list[Json]) -> str:
    """That nothing is known of a model but its answers."""
    names = listed([model["name"] for model in untold])
    have = "its server gives" if len(untold) == 1 else "their servers give"
    return f"Compared with full precision by answers alone: {names}; {have} no log-probabilities of a prompt."


def first_differences(untold: list[Json]) -> str:
    """Where answers begin to differ, for models of which nothing else is known."""
    parts = []
    for model in untold:
        first = model["answers"]["first_different_median"]
        at = "in no answer" if first is None else f"by token {first + 1:.0f} in half of those that do"
        parts.append(f"{model['name']} {at}")
    return f"Where greedy answers begin to differ from full precision's: {listed(parts)}."


def nearest(ranked: list[Json], noise: Json) -> str:
    """Which model is the nearest, and how near that is; KL of a served one is a lower bound."""
    first, floor = ranked[0], noise["kl"]["mean"]["mean"]
    kl, agrees = first["tokens"]["kl"]["mean"]["mean"], first["tokens"]["top1"]["mean"]
    least = "at least " if first["tokens"]["coarse"] else ""
    times = f", {kl / floor:,.0f} times what mere rounding to bfloat16 does" if floor and kl > 2 * floor else ""
    alike = f"the likeliest next token at {percent(agrees)} of positions"
    said = f"{first['name']} agrees with full precision on {alike}"
    if len(ranked) > 1:
        said = f"Nearest to full precision is {first['name']}: it agrees on {alike}"
    return f"{said} (KL {least}{kl:.3g} nats a token{times})."


def lost(original: Json, ranked: list[Json]) -> str:
    """What is lost: problems where there are any, else whole answers."""
    if original["tasks"]:
        parts = []
        for model in ranked:
            if not model["tasks"]["lost"] + model["tasks"]["gained"]:
                parts.append(f"{model['name']} the same ones")
                continue
            solves, interval = f"{model['name']} {percent(model['tasks']['accuracy'])}", model["tasks"]["interval"]
            if interval is None:
                parts.append(f"{solves} (too few to tell)")
                continue
            low, high = (100 * end for end in interval)
            surely = "" if _above(interval) or _below(interval) else ", which may be chance"
            parts.append(f"{solves} ({signed(low)} to {signed(high)} points with 95 % confidence{surely})")
        own = original["tasks"]
        return f"Of {own['problems']} problems full precision solves {percent(own['accuracy'])}, {listed(parts)}."
    parts = [f"{percent(model['answers']['identical'])} of {model['name']}'s answers" for model in ranked]
    return f"Word for word the same as full precision's are {listed(parts)}, where each answers by itself."


def cut_off(original: Json) -> str:
    """That problems solved say little where most answers had no room."""
    if not original["tasks"] or original["answers"]["ended"] >= MOST:
        return ""
    return "Most answers of full precision were cut off, which says little of problems: raise --answer-tokens."


def standard_tasks(ranked: list[Json]) -> str:
    """Which models are surely worse in which of lm_eval's tasks; nothing where none was run, or none can tell."""
    run = [model for model in ranked if model["lm_eval"]]
    told = [entry["task"] for entry in run[0]["lm_eval"] if _paired(entry)] if run else []
    if not told:
        return ""
    parts = [f"{model['name']} ({listed(worse(model))})" for model in run if worse(model)]
    said = f"surely worse than full precision: {listed(parts)}" if parts else "none is surely worse than full precision"
    return f"By lm_eval's {listed(told) if len(told) <= 3 else f'{len(told)} tasks'}, {said}."


def worse(model: Json) -> list[str]:
    """The tasks of lm_eval at which a model is surely worse, by the whole 95 % interval of the first paired metric."""
    paired = [(entry["task"], _paired(entry)) for entry in model["lm_eval"] or ()]
    return [
        task
        for task, metric in paired
        if metric and (_below if metric["higher_is_better"] else _above)(metric["interval"])
    ]


def _paired(entry: Json) -> Json | None:
    """The first metric of a task that says whether a model is worse."""
    told = (m for m in entry["metrics"] if m["interval"] and m["higher_is_better"] is not None)
    return next(told, None)


def where(ranked: list[Json]) -> str:
    """Where it shows: along the answer, and at tokens that full precision was sure of."""
    worst = ranked[-1]
    growth, flips = worst["tokens"]["growth"], worst["tokens"]["flips"]
    decided = percent(flips["decided"]["mean"])
    flipped = f"{decided} of its tokens flip although full precision had decided"
    name = worst["name"]
    if growth is None or growth["difference"]["standard_error"] is None:
        return f"In {name}, {flipped}."
    more, error = growth["difference"]["mean"], growth["difference"]["standard_error"]
    if abs(more) <= 2 * error:
        return f"In {name} the damage is even along an answer (its halves do not surely differ); {flipped}."
    ratio = growth["second"]["mean"] / growth["first"]["mean"] if growth["first"]["mean"] > 0 else 0.0
    way = f"grows along an answer ({ratio:.1f} times" if more > 0 else f"shrinks along an answer ({ratio:.1f} times"
    return f"In {name} the damage {way} as much in the second half as in the first); {flipped}."


def endings(original: Json, ranked: list[Json]) -> str:
    """Whether answers come to an end, and whether thinking closes."""
    models = [original, *ranked]

    def of_each(share: Callable[[Json], float]) -> str:
        return listed([f"{_called(model)} {percent(share(model))}" for model in models])

    said = f"Answers that come to their end in the tokens allowed: {of_each(lambda m: m['answers']['ended'])}"
    looping = any(model["answers"]["loops"] for model in models)
    said += f"; that end in a loop: {of_each(lambda m: m['answers']['loops'])}" if looping else "; none ends in a loop"
    if all(model["answers"]["thinking"] for model in models):
        said += f"; thinking that closes: {of_each(lambda m: m['answers']['thinking']['closed'])}"
    return f"{said}."


def advice(original: Json, ranked: list[Json]) -> str:
    """What to do: use the smallest that is fit, and what to try for those that are not."""
    fit = [model for model in ranked if not faults(model)]
    unfit = [f"{m['name']} ({listed(faults(m))})" for m in ranked if faults(m)]
    said = []
    if fit:
        sized = [model for model in fit if model["size"]]
        smallest = min(sized, key=lambda model: int(model["size"]["size_bytes"]), default=None)
        named = [f"{smallest['name']} ({megabytes(smallest)})"] if smallest else []
        alone = " (judged by its answers alone)"
        named += [f"{m['name']}{'' if m['tokens'] else alone}" for m in fit if not m["size"]]
        said.append(f"nothing measured here speaks against {listed(named)}")
    if unfit:
        said.append(
            f"think twice about {listed(unfit)}: more bits, or `logitwise refit CHECKPOINT OUT --original FP --polish` "
            "at the same size"
        )
    text = "; ".join(said)
    return f"What to do: {text}."


def faults(model: Json) -> list[str]:
    """What speaks against a model, in words; nothing where nothing does."""
    found = []
    if model["tokens"] and model["tokens"]["flips"]["decided"]["mean"] > OVERTURNED:
        found.append("it overturns decisions")
    if model["tasks"] and _below(model["tasks"]["interval"]):
        found.append("it solves fewer problems")
    if _below(model["answers"]["ended_interval"]):
        found.append("fewer of its answers end")
    if _above(model["answers"]["loops_interval"]):
        found.append("more of them end in a loop")
    if worse(model):
        found.append(f"it is worse at {listed(worse(model))}")
    return found


def _below(interval: list[float] | None) -> bool:
    """Whether a difference is surely less than none."""
    return interval is not None and interval[1] < 0


def _above(interval: list[float] | None) -> bool:
    """Whether it is surely more."""
    return interval is not None and interval[0] > 0


def percent(share: float) -> str:
    """A share in words: one decimal near the ends, where it matters."""
    value = 100 * share
    return f"{value:.1f} %" if value and (value < 10 or value > 90) and value != 100 else f"{value:.0f} %"


def signed(points: float) -> str:
    """A difference in whole points; 0 has no sign."""
    whole = round(points)
    return f"{whole:+d}" if whole else "0"


def listed(parts: list[str]) -> str:
    """Several things as a sentence has them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def megabytes(model: Json) -> str:
    """A model's size in words."""
    size = model["size"]["size_bytes"]
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _called(model: Json) -> str:
    return "full precision" if model["original"] else str(model["name"])
