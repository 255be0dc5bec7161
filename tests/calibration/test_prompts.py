"""Shipped prompts are many, different and decided by the seed."""

from pathlib import Path

import pytest

from logitwise.calibration import prompts as prompts_module
from logitwise.calibration.prompts import prompts_of_file, shipped_prompts
from logitwise.errors import CalibrationError


def test_prompts_are_different_filled_in_and_decided_by_the_seed() -> None:
    prompts = shipped_prompts(5000, 0)
    assert len(prompts) == len(set(prompts)) == 5000
    assert not [prompt for prompt in prompts if "{" in prompt or "}" in prompt]
    assert prompts == shipped_prompts(5000, 0)
    assert prompts[:100] == shipped_prompts(100, 0)
    assert len(set(prompts[:100]) & set(shipped_prompts(100, 1))) < 10


def test_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = b"[numbers]\nn = [1, 2]\n[kinds]\nk = ['{n} {w}']\n[fields]\nw = ['a', 'b', 'c']"
    monkeypatch.setattr(
        prompts_module.tomllib, "loads", lambda text, loads=prompts_module.tomllib.loads: loads(small.decode())
    )
    assert sorted(shipped_prompts(6, 0)) == ["1 a", "1 b", "1 c", "2 a", "2 b", "2 c"]
    with pytest.raises(CalibrationError, match=r"7 prompts are more .*\n.*only 6 different"):
        shipped_prompts(7, 0)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('Why?\n\n  How, then?\n{"prompt": "two\\nlines", "id": 1}\n', encoding="utf-8")
    assert prompts_of_file(path) == ["Why?", "How, then?", "two\nlines"]
    path.write_text('Why?\n{"question": "x"}\n')
    with pytest.raises(CalibrationError, match=r"prompts\.txt, line 2 has no prompt"):
        prompts_of_file(path)
    path.write_text("Why?\n{x}\n")
    with pytest.raises(CalibrationError, match=r"prompts\.txt, line 2 is not JSON"):
        prompts_of_file(path)
