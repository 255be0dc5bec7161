"""Which windows are planned, and what each is fitted on."""

from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model

import logitwise
from logitwise import stream
from logitwise.calibration.rows import Rows
from logitwise.errors import RecipeError
from logitwise.fit import Data, Window, fit
from logitwise.grid import Grid
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.quantizers.informed import gptq
from logitwise.quantizers.starts import StartPoint
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton
from logitwise.stream import Walk
from logitwise.watch import SILENT
from logitwise.windows import Step, check_windows, made_by_mse, plan_steps

TOKENS = 12
SHORT = {
    "bits": 3,
    "group_size": 16,
    "row_tokens": TOKENS,
    "rows": 8,
    "held_out": 4,
    "steps": 4,
    "batch": 4,
    "checks": 1,
}


def recipe(**changes: object) -> logitwise.Recipe:
    return logitwise.Recipe.load(None, **{**SHORT, **changes})


def plan(depth: int, **changes: object) -> list[Step]:
    return plan_steps(recipe(**changes), depth, "root")


def fits(steps: list[Step]) -> list[list[int]]:
    return [[*step.blocks] for step in steps if not step.refit]


@pytest.mark.parametrize(
    ("depth", "changes", "expected"),
    [
        (3, {}, [[0], [1], [2]]),
        (4, {"window": 2}, [[0, 1], [1, 2], [2, 3]]),
        (5, {"window": 2, "stride": 2}, [[0, 1], [2, 3], [3, 4]]),
        (4, {"window": 3, "grow": True}, [[0], [0, 1], [0, 1, 2], [1, 2, 3]]),
        (2, {"window": 2}, [[0, 1]]),
    ],
)
def test_windows_slide_to_the_last_block(depth: int, changes: dict[str, object], expected: list[list[int]]) -> None:
    assert fits(plan(depth, **changes)) == expected


def test_a_block_that_is_fitted_again_starts_from_what_it_has_learned() -> None:
    steps = plan(4, window=2, final_blocks=2, shrink=True)
    keys = [step.key for step in steps]
    assert [step.starts for step in steps] == [
        (None, None),
        (keys[0], None),
        (keys[1], None),
        (keys[2], keys[2]),
        (keys[3],),
    ]
    assert [step.keeps_state for step in steps] == [True, True, True, True, False]
    fresh = plan(4, window=2, final_blocks=2, start_last="start")
    assert fresh[-1].starts == (None, None)
    assert [step.keeps_state for step in fresh] == [True, True, False, False]
    made = made_by_mse(steps)
    assert [made[block].key for block in range(4)] == [keys[0], keys[1], keys[2], keys[2]]


def test_what_comes_after_a_window_is_not_in_the_keys_before_it() -> None:
    wide, narrow = plan(4, window=2, final_blocks=1), plan(4, window=2, final_blocks=1, objective="logit_mse")
    assert [step.key for step in wide[:-1]] == [step.key for step in narrow[:-1]]
    assert wide[-1].key != narrow[-1].key
    assert len({step.key for step in wide}) == len(wide)


def test_windows_have_settings_of_their_own() -> None:
    adam = {"optimizer": "adam", "rate": 0.5, "schedule": "constant"}
    own = [
        {"blocks": [0, 1], "steps": 9, "rows": 6},
        {"blocks": [1, 1], "batch": 2, "learning": {"scale": adam}},
        {"blocks": [-1, -1], "steps": 0},
    ]
    apart = {"rows": 8, "start_last": "start"}  # so that the last fit's key has nothing of the one before it
    steps, plain = plan(4, windows=own, **apart), plan(4, **apart)
    assert [(step.steps, step.batch, step.train) for step in steps] == [
        (9, 4, 6),
        (9, 2, 6),
        (4, 4, 8),
        (0, 4, 8),
        (4, 4, 8),  # the final block by the objective has the settings of the final blocks
    ]
    assert [step.learning["scale"].rate == 0.5 for step in steps] == [False, True, False, False, False]
    assert steps[1].learning["rounding"] == plain[1].learning["rounding"]
    assert [step.key == other.key for step, other in zip(steps, plain, strict=True)] == 5 * [False]
    later = plan(4, windows=own[2:], **apart)
    assert [step.key == other.key for step, other in zip(later, plain, strict=True)] == [True] * 3 + [False, True]
    assert [step.train for step in plan_steps(recipe(windows=own, rows=8), 4, "root", most=5)] == [5] * 5


def test_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"blocks = \[4, 5\] means no block\n.*has 4, from 0 to 3"):
        check_windows(recipe(windows=[{"blocks": [4, 5]}]), 4)
    with pytest.raises(RecipeError, match=r"window 5 is too many\n.*4 blocks\n.*1 to 4"):
        check_windows(recipe(window=5), 4)
    with pytest.raises(RecipeError, match=r"final_blocks 5 is too many\n.*4 blocks\n.*1 to 4, or all"):
        check_windows(recipe(final_blocks=5), 4)
    with pytest.raises(RecipeError, match=r"stride of 3 leaves blocks out\n.*has 2\n.*1 to 2"):
        check_windows(recipe(window=2, stride=3), 4)
    check_windows(recipe(window=2, stride=2, final_blocks="all"), 4)


STAGE = {"slots": ["*.q_proj"], "at": "own"}


@pytest.mark.parametrize("changes", [{"window": 2}, {"final_blocks": 2}, {"final_blocks": "all"}], ids=str)
@pytest.mark.parametrize("given", [{"method": "gsq"}, {"stages": [STAGE]}], ids=str)
def test_blocks_that_are_fitted_together_have_no_stages(given: dict[str, object], changes: dict[str, object]) -> None:
    whose = "stages of gsq" if given.get("method") else "stages"
    message = rf"blocks together cannot be fitted in stages\n.*the {whose} are those of one block\n.*stages=\[\]"
    with pytest.raises(RecipeError, match=message):
        check_windows(recipe(**given, **changes), 4)
    check_windows(recipe(**{**given, "stages": []}, **changes), 4)
    check_windows(recipe(**given), 4)
    check_windows(recipe(**given, final_blocks="all", objective="lfq"), 1)


def test_stages_and_what_they_leave_out_are_in_the_keys() -> None:
    keys = {
        tuple(step.key for step in plan(2, **changes))
        for changes in (
            {},
            {"stages": [STAGE]},
            {"stages": [{**STAGE, "at": "common"}]},
            {"stages": [{**STAGE, "slots": ["*.k_proj"]}]},
            {"stages": [STAGE, {**STAGE, "slots": ["*.k_proj"]}]},
        )
    }
    assert len(keys) == 5
    assert not set.intersection(*map(set, keys))
    # The final block's fit comes after others whose key has it anyway; here there are none before it.
    apart = [{"start_last": "start"}, {"start_last": "start", "stages": [STAGE]}]
    (_, plain), (_, staged) = (plan(1, left_out=0.0, **given) for given in apart)
    (_, other), (_, other_staged) = (plan(1, left_out=0.1, **given) for given in apart)
    assert plain.key == other.key
    assert staged.key != other_staged.key


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "gsq"},
        {"method": "gsq", "start": "gptq"},
        {"start_last": "start"},
        {"final_blocks": 2, "shrink": True, "start_last": "start"},
        {"final_blocks": 3},
        {"window": 2},
        {"window": 2, "final_blocks": 2},
        {"window": 2, "grow": True, "objective": "mse"},
        {"window": 3, "stride": 2, "final_blocks": 2},
        {"window": 2, "final_blocks": 2, "start": "gptq"},
        {"window": 2, "final_blocks": 3, "shrink": True},
        {"final_blocks": 2, "shrink": True},
    ],
    ids=str,
)
def test_each_window_is_fitted_on_what_comes_out_of_the_blocks_before_it(
    changes: dict[str, object], tmp_path: Path
) -> None:
    """Students' inputs came through the codes that are stored in the end, teachers' outputs through full precision."""
    skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32)
    ids = torch.randint(VOCABULARY, (12, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids[:, :-1], ids[:, 1:], torch.ones(12, TOKENS))
    made = recipe(**changes)
    steps, folder = plan_steps(made, len(skeleton), "root"), RunFolder(tmp_path / "run")
    seen: list[tuple[range, Data]] = []

    def spy(window: Window, quantizers: object, objective: object, head: object, data: Data, *rest: object) -> object:
        copied = Data(
            data.inputs.clone(), data.targets.clone(), data.weights, data.following, data.train, data.held_out
        )
        seen.append((window.blocks, copied))
        return fit(window, quantizers, objective, head, data, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "fit", spy)
        Walk(skeleton, made, rows, 4, folder, lambda slot: False).run(steps, SILENT)
    assert [blocks for blocks, _ in seen] == [step.blocks for step in steps]
    calls = skeleton.calls(TOKENS)
    fixed_by: dict[int, Step] = {}
    for step, (blocks, data) in zip(steps, seen, strict=True):
        student, teacher = skeleton.embed(ids[:, :-1]), skeleton.embed(ids[:, :-1])
        for block in range(blocks[-1] + 1):
            window = Window(skeleton, range(block, block + 1), calls, lambda slot: False)
            window.advance(teacher, {}, 4)
            if block < blocks[0]:
                codes = {slot: folder.load(fixed_by[block].key, made.grid, slot.name) for slot in window.slots}
                window.advance(student, {slot: q.dequantize() for slot, q in codes.items()}, 4)
        assert torch.allclose(data.inputs, student, rtol=0, atol=1e-5), step.title
        assert torch.allclose(data.targets, teacher, rtol=0, atol=1e-5), step.title
        fixed_by |= dict.fromkeys(step.blocks, step)


def test_only_blocks_that_are_new_are_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, ...]] = []

    def counting(weight: torch.Tensor, grid: Grid, moments: torch.Tensor) -> StartPoint:
        started.append(tuple(weight.shape))
        return gptq(weight, grid, moments)

    monkeypatch.setitem(stream.INFORMED, "gptq", counting)
    skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32)
    ids = torch.randint(VOCABULARY, (12, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids[:, :-1], ids[:, 1:], torch.ones(12, TOKENS))
    made = recipe(window=2, start="gptq", objective="mse")
    steps = plan_steps(made, len(skeleton), "root")
    Walk(skeleton, made, rows, 4, RunFolder(tmp_path / "run"), lambda slot: False).run(steps, SILENT)
    assert len(started) == 7 * len(skeleton)


def test_what_is_loaded_leaves_the_windows_weights_alone(tmp_path: Path) -> None:
    skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32)
    window = Window(skeleton, range(1), skeleton.calls(TOKENS), lambda slot: False)
    before = {key: weight.clone() for key, weight in window.weights[0].items()}
    quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: Grid(3, 16, False), STARTS["minmax"])
    folder = RunFolder(tmp_path / "run")
    states = {slot.name: {part: x + 1 for part, x in q.state_dict().items()} for slot, q in quantizers.items()}
    folder.save("key", {}, {}, states)
    for slot, quantizer in quantizers.items():
        expected = quantizer.log_divisor.detach() + 1
        folder.load_state("key", slot.name, quantizer)
        assert torch.equal(quantizer.log_divisor, expected)
        assert quantizer.log_divisor.requires_grad
    assert all(torch.equal(window.weights[0][key], weight) for key, weight in before.items())
