"""Prompts and problems as files have them; what is refused, with its line."""

from importlib.resources import files
from pathlib import Path

import pytest
from source_files import llama_config, tokenizer

from logitwise.calibration.prompts import shipped_prompts
from logitwise.comparison.asked import as_tokens, read_asked, read_problems
from logitwise.errors import CalibrationError
from logitwise.measure.problems import make_problems
from logitwise.measure.tasks import Problem


def test_the_package_s_prompts_are_of_no_calibration() -> None:
    asked = read_asked(None, None, None, 0)
    assert len(asked.prompts) == len(set(asked.prompts)) == 40
    assert not set(asked.prompts) & set(shipped_prompts(5000, 0))
    text = files("logitwise.calibration").joinpath("prompts.toml").read_text(encoding="utf-8")
    assert not [prompt for prompt in asked.prompts if prompt in text]
    assert asked.problems == []


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "1 + 1?", "answer": 2}\n\n{"question": "2 + 2?", "answer": "so #### 4"}\n')
    assert read_problems(path) == [Problem("1 + 1?", "2"), Problem("2 + 2?", "so #### 4")]
    asked = read_asked(None, path, "gsm8k", 0)
    assert (asked.tasks_from, asked.extractor, len(asked.problems)) == ("tasks.jsonl", "gsm8k", 2)


def test_problems_of_the_package_s_own() -> None:
    asked = read_asked(None, "problems", None, 7)
    assert asked.problems == make_problems(60, 7)
    assert asked.extractor == "last-number"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "x"', "column 15"),
        ('{"prompt": "x"}', "keys prompt and answer"),
        ('["x"]', "keys prompt and answer"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line)
    with pytest.raises(CalibrationError, match=f"(?s)line 2 is no problem.*{why}"):
        read_problems(path)


def test_a_prompt_without_room_for_an_answer_is_refused() -> None:
    config = llama_config(max_position_embeddings=16)
    assert len(as_tokens(tokenizer(), config, ["abc"])) == 1
    with pytest.raises(CalibrationError, match="leaves no room for an answer"):
        as_tokens(tokenizer(), config, ["abc", "x" * 40])
