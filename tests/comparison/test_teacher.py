"""Rows of answers and where their tokens stand, by hand."""

import torch
from helpers import MemorySource, tiny_model

from logitwise.comparison.candidates import Candidate
from logitwise.comparison.teacher import Teacher, rows_of

ROWS = rows_of([[5, 6, 7], [8]], [[9, 1], [3, 4, 1]])


def test_rows_count_the_answer_alone() -> None:
    assert ROWS.ids.tolist() == [[5, 6, 7, 9], [8, 3, 4, 1]]
    assert ROWS.following.tolist() == [[6, 7, 9, 1], [3, 4, 1, 0]]
    assert ROWS.weights.tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]


def test_tokens_know_their_answer_and_their_place() -> None:
    original = Candidate("full", MemorySource(tiny_model("llama")), "")
    teacher = Teacher(original, ROWS, torch.zeros(5, 48, dtype=torch.bfloat16), "", 0.0)
    assert teacher.answer.tolist() == [0, 0, 1, 1, 1]
    assert teacher.position.tolist() == [0, 1, 0, 1, 2]
    assert teacher.written.tolist() == [9, 1, 3, 4, 1]


def test_some_tokens_keep_their_answer_and_their_place() -> None:
    original = Candidate("full", MemorySource(tiny_model("llama")), "")
    teacher = Teacher(original, ROWS, torch.arange(5.0)[:, None].bfloat16(), "", 0.0)
    some = teacher.only(torch.tensor([False, False, True, False, True]))
    assert some.answer.tolist() == [1, 1]
    assert some.position.tolist() == [0, 2]
    assert some.written.tolist() == [3, 1]
    assert some.hidden.squeeze(1).tolist() == [2, 4]
    assert teacher.answer.tolist() == [0, 0, 1, 1, 1], "the teacher itself is as it was"
