"""What a recipe asks for and would not get is refused before the model is looked at."""

from pathlib import Path
from typing import Any

import pytest

import logitwise
from logitwise.errors import RecipeError, SourceError
from logitwise.objectives import OBJECTIVES
from logitwise.quantizers import QUANTIZERS
from logitwise.recipe import PRESETS

LEARNING = {"scale": {"optimizer": "adam", "rate": 1e-3, "schedule": "cosine"}}
OF_THE_REFIT: dict[str, Any] = {
    "choose_last": "last",
    "final_blocks": 2,
    "fresh_last": True,
    "shrink": True,
    "teacher_last": "quantized",
    "start_last": "start",
    "learning_last": LEARNING,
    "objective_settings": {"temperature": 2.0},
}
OF_THE_POLISH: dict[str, Any] = {
    "polish_steps": 7,
    "polish_batch": 2,
    "polish_learning": LEARNING,
    "polish_rows": 5,
    "polish_fresh": True,
}


def check(out: Path, preset: str | None = None, **changes: Any) -> None:
    """A run of a model that is not there."""
    logitwise.quantize(out.with_name("nowhere"), out, logitwise.Recipe.load(preset, **{"device": "cpu", **changes}))


def refused(message: str, out: Path, **changes: Any) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        check(out, **changes)
    assert caught.value.exit_code == 2


def allowed(out: Path, preset: str | None = None, **changes: Any) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        check(out, preset, **changes)


@pytest.mark.parametrize("key", OF_THE_REFIT)
def test_options_of_the_objectives_fit_are_refused_where_there_is_none(key: str, tmp_path: Path) -> None:
    given = {key: OF_THE_REFIT[key]}
    refused(
        f"{key}.* is not read\n.*(mse fits final blocks as all others|mse has no settings)",
        tmp_path,
        objective="mse",
        **given,
    )
    refused(f"{key}.* is not read\n.*(rtn learns nothing|what is learned is nothing)", tmp_path, method="rtn", **given)
    allowed(tmp_path, **{"final_blocks": 2, **given})


@pytest.mark.parametrize(
    "given", [{"window": 2}, {"left_out": 0.001}, {"windows": [{"blocks": [0, 0]}]}, {"stages": []}], ids=str
)
def test_options_of_the_fit_are_refused_where_nothing_is_learned(given: dict[str, Any], tmp_path: Path) -> None:
    refused(f"{next(iter(given))} is not read\n.*rtn learns nothing", tmp_path, method="rtn", **given)
    allowed(tmp_path, **given)


@pytest.mark.parametrize("given", [{"stride": 2}, {"grow": True}], ids=str)
def test_windows_of_one_block_have_neither_stride_nor_growth(given: dict[str, Any], tmp_path: Path) -> None:
    refused(f"{next(iter(given))} is not read\n.*do not overlap\n.*larger window", tmp_path, **given)
    allowed(tmp_path, window=2, **given)


def test_shrinking_is_refused_where_one_block_is_alone(tmp_path: Path) -> None:
    message = "shrink is not read\n.*one final block is alone already\n.*--final-blocks, or leave shrink out"
    refused(message, tmp_path, shrink=True)


@pytest.mark.parametrize("key", OF_THE_POLISH)
def test_options_of_the_polish_are_refused_without_it(key: str, tmp_path: Path) -> None:
    given = {key: OF_THE_POLISH[key]}
    refused(f"{key} is not read\n.*--polish.*\n.*add --polish.*, or leave {key} out", tmp_path, **given)
    for more in ({}, {"objective": "mse"}, {"method": "rtn"}):
        allowed(tmp_path, polish=True, **more, **given)


@pytest.mark.parametrize("key", ["rows_last", "steps_last", "batch_last"])
@pytest.mark.parametrize("changes", [{"objective": "mse"}, {"method": "rtn"}], ids=str)
def test_length_and_rows_of_the_final_blocks_are_theirs_with_any_fit(
    key: str, changes: dict[str, str], tmp_path: Path
) -> None:
    allowed(tmp_path, **{key: 3}, **changes)


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {"whole"}))
def test_every_preset_goes_with_every_method_and_objective_and_without_its_polish(preset: str, tmp_path: Path) -> None:
    for changes in [{"method": m} for m in QUANTIZERS] + [{"objective": o} for o in OBJECTIVES]:
        allowed(tmp_path, preset, **changes)
        allowed(tmp_path, preset, polish=False, **changes)


def test_the_preset_of_the_whole_model_needs_something_to_learn_and_a_head_to_look_through(tmp_path: Path) -> None:
    for changes in [{"method": "signround"}, {"objective": "hard_labels"}, {"polish": False}, {"fresh_last": True}]:
        allowed(tmp_path, "whole", **changes)
    refused("final_blocks is not read\n.*rtn learns nothing", tmp_path, preset="whole", method="rtn")
    refused(
        "final_blocks is not read\n.*mse fits final blocks as all others", tmp_path, preset="whole", objective="mse"
    )


@pytest.mark.parametrize(("key", "value"), [("polish_fresh", True), ("fresh_last", True), ("temperature", 0.5)])
def test_how_text_is_written_is_refused_where_it_is_read(key: str, value: object, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("Something.")
    given = {key: value, "polish": True, "calibration": f"text:{text}"}
    refused(f"{key} is not read\n.*is read, not written\n.*self or server.*leave {key} out", tmp_path / "out", **given)


def test_a_window_that_shrinks_has_no_fresh_rows(tmp_path: Path) -> None:
    refused("fresh_last is not read\n.*shrinks", tmp_path, fresh_last=True, shrink=True, final_blocks=2)


def test_a_method_that_goes_by_the_steps_done_has_no_fresh_rows(tmp_path: Path) -> None:
    refused("fresh_last is not read\n.*gsq goes by the share of its steps", tmp_path, fresh_last=True, method="gsq")


NAN = float("nan")


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("lfq", {"temperature": 0}, "temperature = 0 is not possible\n.*greater than 0\n.*leave it out for 1.0"),
        ("lfq", {"temperature": -1.0}, "temperature = -1.0 is not possible\n.*greater than 0"),
        ("lfq", {"temperature": True}, "temperature = True is not possible\n.*a valid number"),
        ("lfq", {"temperature": "hot"}, "temperature = 'hot' is not possible\n.*a valid number"),
        ("lfq", {"temperature": NAN}, "temperature = nan is not possible\n.*a finite number"),
        ("mixed", {"temperature": 0}, "temperature = 0 is not possible\n.*greater than 0"),
        ("mixed", {"share": -0.5}, "share = -0.5 is not possible\n.*greater than or equal to 0"),
        ("mixed", {"share": NAN}, "share = nan is not possible\n.*a finite number"),
        ("topk", {"k": 0}, "k = 0 is not possible\n.*greater than or equal to 1\n.*leave it out for 64"),
        ("topk", {"k": 2.5}, "k = 2.5 is not possible\n.*a valid integer"),
        ("topk", {"k": True}, "k = True is not possible\n.*a valid integer"),
        ("hard_labels", {"prompts": 1}, "prompts = 1 is not possible\n.*a valid boolean"),
    ],
)
def test_a_setting_of_an_objective_out_of_range_is_refused(
    objective: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(rf"objective_settings\.{message}", tmp_path, objective=objective, objective_settings=settings)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("lfq", {"temperature": 2}),
        ("mixed", {"share": 0, "temperature": 0.5}),
        ("mixed", {"share": 20.0}),
        ("topk", {"k": 1}),
        ("hard_labels", {"prompts": True}),
    ],
)
def test_a_setting_of_an_objective_within_its_range_is_taken(
    objective: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    allowed(tmp_path, objective=objective, objective_settings=settings)
