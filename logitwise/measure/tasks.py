"""Exact-match tasks: what an answer says, whether it is right, and how often several tries hold a right one."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?\d[\d,]*(?:\.\d+)?")
"""With its sign, which a minus between two numbers is not."""


@dataclass(frozen=True)
class Problem:
    """A prompt with one right answer."""

    prompt: str
    answer: str


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands commas and trailing zeros."""
    found = NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def after_hashes(text: str) -> str | None:
    """What follows the last `####` up to the end of its line; GSM8K marks its answers so."""
    _, found, after = text.rpartition("####")
    if not found:
        return None
    line = after.strip().splitlines()[0].strip() if after.strip() else ""
    return _plain(line.lstrip("$").rstrip(".")) if NUMBER.fullmatch(line.lstrip("$").rstrip(".")) else line


def gsm8k(text: str) -> str | None:
    """GSM8K's: the number after the last `####` that has one, else the last; `####` begins headings, too."""
    marked = re.findall(rf"####\s*\$?({NUMBER.pattern})", text)
    return _plain(marked[-1]) if marked else last_number(text)


def after_answer(text: str) -> str | None:
    """The word or number that follows the last `Answer:`."""
    found = re.findall(r"[Aa]nswer:\s*\**\s*(-?[\w.,]*\w)", text)
    return _plain(found[-1]) if found and NUMBER.fullmatch(found[-1]) else (found[-1] if found else None)


def exact(text: str) -> str | None:
    """The whole text, white space at its ends apart."""
    return text.strip()


def choice(text: str) -> str | None:
    """The letter of a choice: after the last `answer is` or `Answer:`, else the last one that stands alone, A to J.

    A and I are words, too: alone they are letters where they are in brackets or something closes them.
    """
    marked: list[str] = re.findall(r"(?i:answer)(?:\s+is:?|:)\s*\**\(?([A-J])\b", text)
    alone: list[str] = re.findall(r"(?<![\w'])([B-HJ]\b(?!')|(?<=\()[AI](?=\))|[AI](?=[.):,*]|\s*$))", text)
    found = marked or alone
    return found[-1] if found else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "last-number": last_number,
    "after-hashes": after_hashes,
    "gsm8k": gsm8k,
    "after-answer": after_answer,
    "exact": exact,
    "choice": choice,
}


def right(problem: Problem, text: str, extractor: str) -> bool:
    """Whether a text's answer is the problem's, once the extractor has read both; a reference may be bare."""
    extract = EXTRACTORS[extractor]
    bare = problem.answer.strip()
    wanted = extract(problem.answer) or (_plain(bare) if NUMBER.fullmatch(bare) else bare)
    return extract(text) == wanted


def pass_at_k(tries: int, rights: int, k: int) -> float:
    """The probability that k of the tries, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al., 2021, arXiv 2107.03374, equation 1; 1 - (1 - c/n)^k is biased.

    Args:
        tries: n, how many answers were sampled for the problem.
        rights: c, how many of them are right.
        k: at most `tries`.
    """
    if not 1 <= k <= tries:
        raise ValueError(f"pass@{k} of {tries} tries")
    return 1 - math.comb(tries - rights, k) / math.comb(tries, k)


def _plain(number: str) -> str:
    number = number.replace(",", "").replace("\u2212", "-")
    return number.rstrip("0").rstrip(".") if "." in number else number
