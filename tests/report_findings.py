"""Findings of three models, made up, of the schema."""

from itertools import pairwise
from typing import Any


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "standard_error": abs(mean) / 10}


def bins(edges: list[float], first: float, factor: float) -> list[dict[str, Any]]:
    return [
        {"low": low, "high": high, "tokens": 9, "figure": figure(min(1.0, first * factor**place))}
        for place, (low, high) in enumerate(pairwise(edges))
    ]


def calibration() -> dict[str, Any]:
    bars = [{"confidence": 0.35, "backing": 0.3, "tokens": 4}, {"confidence": 0.95, "backing": 0.8, "tokens": 40}]
    return {
        "tokens": 44,
        "kl": figure(0.2),
        "agrees": figure(0.9),
        "overconfidence": figure(0.1),
        "error": 0.1,
        "bins": bars,
    }


def tokens(kl: float) -> dict[str, Any]:
    spread = {"mean": figure(kl), "median": kl / 9, "p90": 2 * kl, "p99": 9 * kl}
    places: list[float] = [0, 8, 16, 24, 32]
    worst = {
        "answer": 0,
        "position": 3,
        "before": "7 plus 8 is",
        "original": " 15",
        "original_probability": 0.99,
        "model": " 16",
        "model_probability": 0.6,
        "margin": 0.98,
    }
    flipped = {"share": figure(0.03), "decided": figure(0.004), "margin": None, "decided_margin": 0.5, "worst": [worst]}
    return {
        "tokens": 320,
        "coarse": None,
        "kl": spread,
        "reverse_kl": spread,
        "top1": figure(0.97),
        "perplexity": figure(1.3),
        "kl_by_confidence": bins([0.3, 0.5, 0.9, 1.0], 2 * kl, 0.4),
        "kl_by_position": bins(places, kl, 1.3),
        "top1_by_position": bins(places, 0.97, 0.99),
        "growth": {"first": figure(kl), "second": figure(2 * kl), "difference": figure(kl)},
        "flips": {**flipped, "by_margin": bins([0, 0.1, 0.5, 1.0], 0.3, 0.2)},
        "confidence": {
            "all": calibration(),
            "low_entropy": calibration(),
            "high_entropy": calibration(),
            "turns": None,
        },
        "endings": {"turn": {"places": 9, "original": 0.9, "model": 0.7}, "thinking": None},
    }


def model(name: str, kl: float | None, size: int) -> dict[str, Any]:
    survival = [1.0] * 33 if kl is None else [max(0.0, 1 - kl * n / 10) for n in range(33)]
    return {
        "name": name,
        "original": kl is None,
        "size": {"size_bytes": size, "bits_per_weight": None if kl is None else 3.3, "bits_per_parameter": 5.0},
        "served": None,
        "tokens": None if kl is None else tokens(kl),
        "answers": {
            "count": 10,
            "identical": survival[-1],
            "first_different_median": None if kl is None else 12.0,
            "survival": survival,
            "tokens": {"mean": 30.0, "median": 31.0},
            "ended": 0.9,
            "ended_interval": [-0.1, 0.1],
            "loops": 0.1,
            "loops_interval": [-0.1, 0.1],
            "repeated": 0.05,
            "thinking": None,
        },
        "tasks": None,
        "lm_eval": None,
    }


def served_model(name: str, kl: float | None) -> dict[str, Any]:
    """A model behind a server, that says nothing of a prompt's probabilities where KL is None."""
    made = model(name, kl, 0) | {"original": False, "size": None}
    made["tokens"] = made["tokens"] and {**made["tokens"], "coarse": {"likeliest": 20, "left_out": 3}}
    made["served"] = {
        "address": "http://localhost:8000/v1",
        "model": name,
        "prompts": "token ids",
        "likeliest": None if kl is None else 20,
        "answer_tokens_by": "server",
    }
    return made


def standard(name: str, value: float, interval: list[float] | None, up: bool = True) -> dict[str, Any]:
    """A task of lm_eval with one metric, of full precision where the interval is empty."""
    metric = {
        "metric": "acc" if up else "word_perplexity",
        "filter": "none" if up else "strict-match",
        "value": value,
        "standard_error": 0.02 if up else None,
        "higher_is_better": up,
        "difference": None if interval == [] else -0.1 if up else 900.0,
        "interval": interval or None,
    }
    return {"task": name, "documents": 1319, "metrics": [metric], "parts": []}


def with_standard(made: dict[str, Any]) -> dict[str, Any]:
    """The same findings with two of lm_eval's tasks, one of which pairs its documents."""
    first, *others = made["models"]
    first["lm_eval"] = [standard("arc_easy", 0.61, []), standard("wikitext", 17.3, [], up=False)]
    for place, model in enumerate(others):
        interval = [-0.2 + 0.15 * place, -0.05 + 0.15 * place]
        model["lm_eval"] = [standard("arc_easy", 0.51, interval), standard("wikitext", 917.3, None, up=False)]
    made["conditions"]["lm_eval"] = {
        "version": "0.4.13",
        "limit": 1319,
        "chat_template": False,
        "log_probabilities_dtype": "float32",
        "seeds": {"random": 0},
        "tasks": [
            {"task": "arc_easy", "from": "lm_eval", "version": "1.0", "few_shot": 0, "documents": 2376},
            {"task": "wikitext", "from": "mine.yaml", "version": "2", "few_shot": None, "documents": 62},
        ],
    }
    return made


def findings() -> dict[str, Any]:
    """Findings that a test may change."""
    differing = {"same": "It is ", "rest": "sixteen.", "first_different": 2, "tokens": 4, "ended": True}
    same = {"same": "It is fifteen.", "rest": "", "first_different": None, "tokens": 4, "ended": True}
    answer = {"text": "It is fifteen.", "tokens": 4, "ended": True}
    return {
        "version": 1,
        "made": "2026-01-01T00:00:00+00:00",
        "conditions": {
            "metric": 1,
            "prompts": {"count": 10, "from": "prompts.txt"},
            "tasks": None,
            "lm_eval": None,
            "measured_on": {"answers": 10, "tokens": 320, "temperature": 0.0},
            "answer_tokens": 32,
            "samples": 0,
            "seed": 0,
            "device": "cpu",
            "answers_dtype": "float32",
            "measured_dtype": "float32",
            "versions": {"torch": "2"},
        },
        "noise": {**tokens(0.0005), "stored_kl": 1e-5},
        "models": [model("model", None, 4_000_000), model("w4", 0.05, 2_000_000), model("w2", 0.9, 1_500_000)],
        "answers": [{"prompt": "What is 7 + 8?", "original": answer, "models": [same, differing]}],
        "sentences": ["One.", "Two.", "Three.", "Four.", "Five."],
    }
