"""What is said to help: options that are there, and change what does not fit."""

import pytest

import logitwise
from logitwise.remedies import more_memory, other_text, smaller_fit


def test_a_smaller_fit_is_named_by_what_decides_its_size() -> None:
    plain = logitwise.Recipe.load(None)
    assert smaller_fit(plain) == "fewer --rows, shorter --row-tokens, or a smaller --batch"
    whole = smaller_fit(logitwise.Recipe.load("whole"))
    assert "fewer --rows and --set rows_last," in whole
    assert "a smaller --batch and --set batch_last and --set polish_batch, or fewer --final-blocks" in whole


@pytest.mark.parametrize("changes", [{"fresh_last": True}, {"polish": True, "polish_fresh": True}])
def test_text_that_is_written_meanwhile_is_not_to_be_read_from_a_file(changes: dict[str, bool]) -> None:
    plain = logitwise.Recipe.load(None)
    assert "text:FILE" in other_text(plain)
    assert not plain.writes_on
    assert "text:FILE" not in other_text(plain.but(**changes))
    assert "fresh" in other_text(plain.but(**changes))


def test_more_memory_on_a_gpu_may_be_a_cpus() -> None:
    assert "--device cpu" in more_memory(True)
    assert "--device" not in more_memory(False)
