"""The five sentences and the advice, from findings made by hand."""

import copy
from typing import Any

import pytest
from report_findings import with_standard

from logitwise.report.markdown import summary_of, table
from logitwise.report.sentences import faults, listed, percent, sentences


def model(
    name: str, kl: float, decided: float, ended: float, interval: tuple[float, float], size: int
) -> dict[str, Any]:
    def figure(mean: float) -> dict[str, float]:
        return {"mean": mean, "standard_error": mean / 10}

    return {
        "name": name,
        "original": False,
        "size": {"size_bytes": size, "bits_per_weight": 3.3, "bits_per_parameter": 5.0},
        "served": None,
        "tokens": {
            "coarse": None,
            "kl": {"mean": figure(kl), "median": kl / 9, "p90": 2 * kl, "p99": 9 * kl},
            "reverse_kl": {"mean": figure(1.1 * kl), "median": kl / 9, "p90": 2 * kl, "p99": 9 * kl},
            "top1": figure(1 - decided * 3),
            "growth": {"first": figure(kl), "second": figure(3 * kl), "difference": figure(2 * kl)},
            "flips": {"share": figure(decided * 3), "decided": figure(decided)},
        },
        "answers": {
            "identical": 0.25,
            "ended": ended,
            "ended_interval": [ended - 1.1, ended - 1 + 0.1],
            "loops": 0.0 if ended > 0.9 else 0.5,
            "loops_interval": [-0.1, 0.1] if ended > 0.9 else [0.1, 0.7],
            "thinking": None,
        },
        "tasks": {
            "problems": 40,
            "accuracy": 0.975 + sum(interval) / 2,
            "difference": sum(interval) / 2,
            "interval": list(interval),
            "lost": 2,
            "gained": 0,
        },
        "lm_eval": None,
    }


@pytest.fixture
def findings() -> dict[str, Any]:
    original = model("full", 0, 0, 1.0, (0, 0), 4_000_000)
    original |= {"original": True, "tokens": None}
    good = model("w3", 0.03, 0.001, 1.0, (-0.05, 0.0), 2_000_000)
    bad = model("w2", 0.8, 0.1, 0.5, (-0.7, -0.5), 1_500_000)
    noise = copy.deepcopy(model("", 0.001, 0, 1, (0, 0), 0)["tokens"])
    return {"models": [original, bad, good], "noise": noise, "conditions": {"lm_eval": None}}


def test_each_sentence_answers_its_question(findings: dict[str, Any]) -> None:
    which, what, where, whether, do = sentences(findings)
    assert which.startswith("Nearest to full precision is w3: it agrees on the likeliest next token at 99.7 %")
    assert "30 times what mere rounding to bfloat16 does" in which
    assert "40 problems full precision solves 97.5 %" in what
    assert "w2 38 % (-70 to -50 points with 95 % confidence)" in what
    assert "w3 95.0 % (-5 to 0 points with 95 % confidence, which may be chance)" in what
    assert "In w2 the damage grows along an answer (3.0 times" in where
    assert "10 % of its tokens flip although" in where
    assert "come to their end in the tokens allowed: full precision 100 %, w3 100 % and w2 50 %" in whether
    assert "end in a loop: full precision 0 %, w3 0 % and w2 50 %" in whether
    assert do.startswith("What to do: nothing measured here speaks against w3 (2.0 MB)")
    reasons = (
        "it overturns decisions, it solves fewer problems, fewer of its answers end and more of them end in a loop"
    )
    assert f"think twice about w2 ({reasons})" in do


def test_the_same_problems_are_said_to_be(findings: dict[str, Any]) -> None:
    findings["models"][2]["tasks"] |= {"lost": 0, "interval": [0.0, 0.0]}
    assert "solves 97.5 %, w3 the same ones and w2 38 % (-70" in sentences(findings)[1]


def test_without_problems_answers_speak(findings: dict[str, Any]) -> None:
    for one in findings["models"]:
        one["tasks"] = None
    assert "25 % of w3's" in sentences(findings)[1]


def test_damage_that_is_even_is_said_to_be(findings: dict[str, Any]) -> None:
    findings["models"][1]["tokens"]["growth"]["difference"] = {"mean": 0.01, "standard_error": 0.01}
    assert "is even along an answer" in sentences(findings)[2]


def test_a_difference_by_chance_is_no_fault(findings: dict[str, Any]) -> None:
    good = findings["models"][2]
    assert faults(good) == []
    good["tasks"]["interval"] = [-0.2, 0.01]
    assert faults(good) == []
    good["tasks"]["interval"] = [-0.2, -0.01]
    assert faults(good) == ["it solves fewer problems"]
    good["tasks"]["interval"] = good["answers"]["ended_interval"] = good["answers"]["loops_interval"] = None
    assert faults(good) == []
    assert "(too few to tell)" in sentences(findings)[1]


def test_nothing_fit_is_not_recommended(findings: dict[str, Any]) -> None:
    del findings["models"][2]
    assert "speaks against" not in sentences(findings)[4]


@pytest.mark.parametrize(
    ("share", "words"), [(0, "0 %"), (0.004, "0.4 %"), (0.5, "50 %"), (0.996, "99.6 %"), (1, "100 %")]
)
def test_percent(share: float, words: str) -> None:
    assert percent(share) == words


def test_the_summary_holds_the_sentences_and_every_model(findings: dict[str, Any]) -> None:
    findings["sentences"] = sentences(findings)
    findings["models"][1]["name"] = "w2|x"
    text = summary_of(findings)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, "every row has every column"
    assert "w2\\|x" in text
    assert "2. Of 40 problems" in text


def test_cells_are_no_markup() -> None:
    assert table(["a"], [["<b>*x*"]]).splitlines()[-1] == "| \\<b>\\*x\\* |"
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_a_served_model_s_kl_is_a_bound(findings: dict[str, Any]) -> None:
    good = findings["models"][2]
    good |= {"size": None, "served": {"address": "http://localhost/v1"}}
    good["tokens"]["coarse"] = {"likeliest": 20, "left_out": 0}
    which, *_, do = findings["sentences"] = sentences(findings)
    assert "(KL at least 0.03 nats a token" in which
    assert do.startswith("What to do: nothing measured here speaks against w3; think twice about w2")
    text = summary_of(findings)
    assert "| w3 | - | - | ≥ 0.03 ± 0.003 |" in text
    assert "≥: a lower bound" in text


def test_answers_without_room_say_little_of_problems(findings: dict[str, Any]) -> None:
    said = "cut off, which says little of problems: raise --answer-tokens"
    assert said not in sentences(findings)[1]
    findings["models"][0]["answers"]["ended"] = 0.49
    assert said in sentences(findings)[1]
    findings["models"][0]["tasks"] = None
    assert said not in sentences(findings)[1]


def test_what_a_server_does_not_say_is_left_out(findings: dict[str, Any]) -> None:
    good = findings["models"][2]
    good |= {"size": None, "served": {"address": "http://localhost/v1"}, "tokens": None}
    good["answers"]["first_different_median"] = 11.0
    which, _, where, _, do = findings["sentences"] = sentences(findings)
    assert which.startswith("w2 agrees with full precision on the likeliest next token at")
    assert where.startswith("In w2 the damage")
    assert "speaks against w3 (judged by its answers alone);" in do
    assert "| w3 | - | - | - | - | - | - | - | - | 25 % |" in summary_of(findings)
    del findings["models"][1]
    which, _, where, *_ = sentences(findings)
    assert "by answers alone: w3; its server gives no log-probabilities of a prompt" in which
    assert where.endswith("w3 by token 12 in half of those that do.")
    good["answers"]["first_different_median"] = None
    assert sentences(findings)[2].endswith("w3 in no answer.")


def test_lm_eval_adds_a_sentence_to_the_second_line(findings: dict[str, Any]) -> None:
    without = sentences(findings)
    _, bad, good = with_standard(findings)["models"]
    told = sentences(findings)
    assert len(told) == 5
    assert told[1] == f"{without[1]} By lm_eval's arc_easy, surely worse than full precision: w2 (arc_easy)."
    assert faults(bad)[-1] == "it is worse at arc_easy"
    assert faults(good) == []
    bad["lm_eval"][0]["metrics"][0]["higher_is_better"] = False
    assert sentences(findings)[1].endswith("By lm_eval's arc_easy, none is surely worse than full precision.")
    good["lm_eval"] = bad["lm_eval"] = None
    assert sentences(findings)[1] == without[1], "servers alone"


def test_the_summary_holds_lm_eval_s_tasks(findings: dict[str, Any]) -> None:
    with_standard(findings)["sentences"] = sentences(findings)
    findings["models"][2]["lm_eval"] = None
    text = summary_of(findings)
    assert "| task | documents | metric | full | w2 | w3 |" in text
    assert "| arc\\_easy | 1,319 | acc ↑ | 0.61 ± 0.02 | 0.51 ± 0.02 (-0.1: -0.2 to -0.05) | - |" in text
    assert "| wikitext | 1,319 | word\\_perplexity, strict-match ↓ | 17.3 | 917.3 (+900) | - |" in text
    assert "by lm_eval 0.4.13, the first 1,319 documents of each task, no chat template" in text
    assert "lm_eval" not in summary_of({**findings, "conditions": {"lm_eval": None}, "sentences": []})
