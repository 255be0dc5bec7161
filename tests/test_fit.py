"""What a fit promises whatever the method and the objective: both are fakes where only the loop is asked."""

import math
import warnings
from collections.abc import Callable
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import MemorySource, last_block, tiny_model
from torch import Tensor, nn

from logitwise import learnable
from logitwise.descent import Schedule
from logitwise.errors import MachineError
from logitwise.fit import Data, Fitted, Window, _learner, batches_of, fit, measure, weights_of
from logitwise.grid import Grid, Quantized, freeze
from logitwise.objectives import OBJECTIVES, Objective, Taps
from logitwise.optimizers import Optimizers, SignSGD, rate_at
from logitwise.quantizers import QUANTIZERS, STARTS, Quantizer, Role, Start
from logitwise.ranks import Ranks
from logitwise.recipe import Learning, Recipe
from logitwise.sharing import Alone
from logitwise.skeleton import Skeleton, Slot
from logitwise.watch import Stage

TOKENS, TRAIN, HELD_OUT = 11, 10, 4
GRID = Grid(3, 16, False)
NONE = torch.zeros(1, 1, dtype=torch.int64)


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def data(skeleton: Skeleton) -> Data:
    """The last block: its inputs, its outputs."""
    ids, hidden, targets = last_block(skeleton, TRAIN + HELD_OUT, TOKENS)
    weights = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) > 0.3).float()
    return Data(hidden, targets, weights, ids.roll(-1, 1), TRAIN, HELD_OUT)


def last_window(skeleton: Skeleton, kept: Callable[[Slot], bool] = lambda slot: False) -> Window:
    return Window(skeleton, range(2, 3), skeleton.calls(TOKENS), kept)


def run(skeleton: Skeleton, data: Data, method: str, objective: str, steps: int = 30, seed: int = 0) -> Fitted:
    window = last_window(skeleton)
    quantizers = window.quantizers(QUANTIZERS[method], lambda _: GRID, STARTS["minmax"])
    schedule = Schedule(steps, 4, 5, Recipe(method=method).learning_of, seed)
    head = skeleton.head() if OBJECTIVES[objective].reads_head else None
    return fit(window, quantizers, OBJECTIVES[objective](), head, data, schedule, Stage())


# ---- the real thing on a tiny llama


# Labels of random tokens teach nothing, nor half of a flat distribution: the controls are not among these.
@pytest.mark.parametrize("objective", ["mse", "lfq", "logit_mse", "mixed"])
@pytest.mark.parametrize("method", [name for name, method in QUANTIZERS.items() if method.learns])
def test_the_held_out_measure_falls_and_the_best_iterate_is_stored(
    skeleton: Skeleton, data: Data, method: str, objective: str
) -> None:
    fitted = run(skeleton, data, method, objective)
    measures = dict(fitted.course.held_out)
    assert list(measures) == [0, 6, 12, 18, 24, 30]
    assert len(fitted.course.losses) == 30
    # Ranges alone can do less than rounding.
    share = 0.99 if method == "lwc" else 0.97
    assert measures[fitted.course.kept] == min(measures.values()) < share * measures[0]
    weights = {slot: q.dequantize() for slot, q in fitted.quantized.items()}
    again = measure(last_window(skeleton), weights, OBJECTIVES[objective](), skeleton.head(), data, 4)
    assert again == measures[fitted.course.kept]


def test_round_to_nearest_goes_through_without_a_step(skeleton: Skeleton, data: Data) -> None:
    fitted = run(skeleton, data, "rtn", "mse", steps=0)
    assert fitted.course.losses == []
    assert [step for step, _ in fitted.course.held_out] == [0]
    assert fitted.course.kept == 0
    assert len(fitted.quantized) == 7


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(skeleton: Skeleton, data: Data) -> None:
    first, second, other = (run(skeleton, data, "flexround", "mse", 6, seed) for seed in (1, 1, 2))
    assert first.course.losses == second.course.losses != other.course.losses
    assert first.course.held_out == second.course.held_out
    for slot, quantized in first.quantized.items():
        assert torch.equal(quantized.codes, second.quantized[slot].codes)
        assert torch.equal(quantized.scale, second.quantized[slot].scale)


def test_a_window_with_nothing_replaced_is_the_teacher(skeleton: Skeleton, data: Data) -> None:
    hidden = data.inputs.clone()
    last_window(skeleton).advance(hidden, {}, 3)
    assert torch.allclose(hidden, data.targets, rtol=0, atol=1e-6)


def test_kept_slots_are_not_quantized(skeleton: Skeleton) -> None:
    window = last_window(skeleton, kept=lambda slot: "mlp" in slot.name)
    assert sorted(slot.module.rpartition(".")[2] for slot in window.slots) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_two_blocks_are_fitted_together(skeleton: Skeleton, data: Data) -> None:
    window = Window(skeleton, range(1, 3), skeleton.calls(TOKENS), lambda slot: False)
    quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: GRID, STARTS["minmax"])
    before = {slot: [p.detach().clone() for p in q.parameters()] for slot, q in quantizers.items()}
    one_step = Schedule(1, 2, 1, Recipe().learning_of, 0)
    no_rows_held_out = Data(data.inputs, data.targets, data.weights, data.following, TRAIN, 0)
    fitted = fit(window, quantizers, OBJECTIVES["mse"](), None, no_rows_held_out, one_step, Stage())
    assert {slot.block for slot in fitted.quantized} == {1, 2}
    for slot, quantizer in quantizers.items():
        for old, new in zip(before[slot], quantizer.parameters(), strict=True):
            assert not torch.equal(old, new)


@pytest.mark.parametrize("objective", ["mse", "lfq"])
@pytest.mark.parametrize("method", ["flexround", "gsq"])
def test_blocks_run_again_going_backward_have_the_gradients_of_the_whole(
    skeleton: Skeleton, data: Data, method: str, objective: str
) -> None:
    """Two blocks, one in memory at a time, against autograd through both at once."""
    window = Window(skeleton, range(1, 3), skeleton.calls(TOKENS), lambda slot: False)
    quantizers = window.quantizers(QUANTIZERS[method], lambda _: GRID, STARTS["minmax"])
    found = []
    for forward in (
        lambda: window.learn(quantizers)(data.inputs, 0.3),
        lambda: window.forward(data.inputs, weights_of(quantizers, 0.3)),
    ):
        taps = data.taps(slice(None), forward(), skeleton.head())
        OBJECTIVES[objective]().loss(taps).backward()
        found.append([p.grad.clone() for q in quantizers.values() for p in q.parameters()])
        for quantizer in quantizers.values():
            quantizer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert any(bool(gradient.abs().max() > 0) for gradient in found[0])


# ---- the loop alone: one number is learned, and the objective says what it likes


class Number(Quantizer):
    """One learned number p; the weight that it stands for is p everywhere."""

    role: Role = "scale"

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1, 1))
        self.seen: list[float] = []
        self.progress: list[float] = []
        self.bounded: list[float] = []

    @classmethod
    def start(cls, weight: Tensor, grid: Grid, start: Start) -> "Number":
        return cls()

    def forward(self, progress: float) -> Tensor:
        self.seen.append(float(self.p.detach()))
        self.progress.append(progress)
        return self.p.expand(8, 8)

    def freeze(self) -> Quantized:
        one = torch.ones(8, 1)
        return freeze(torch.zeros(8, 8), one + self.p.detach(), one, Grid(4, None, False, torch.float32))

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        return {self.role: [self.p]}

    def after_step(self) -> None:
        self.bounded.append(float(self.p.detach()))


class Adding(Window):
    """A window that adds its weight's first element to what comes in, and notes the rows that did."""

    def __init__(self) -> None:
        self.slots = [Slot("model.layers.0.mlp.up_proj.weight", "mlp.up_proj.weight", 0, 8, 8)]
        self.batches: list[list[int]] = []

    def learn(self, quantizers: dict[Slot, Quantizer]) -> Callable[[Tensor, float], Tensor]:
        return lambda hidden, progress: self.forward(hidden, weights_of(quantizers, progress))

    def forward(self, hidden: Tensor, replaced: object) -> Tensor:
        self.batches.append(hidden[:, 0, 0].long().tolist())
        return hidden + replaced[self.slots[0]][0, 0]


class Told(Objective):
    """A loss of slope one whose held-out measures are told beforehand."""

    unit = "told"

    def __init__(self, measures: list[float], loss: Callable[[Tensor], Tensor] = lambda x: x.mean()) -> None:
        self.measures, self._loss = iter(measures), loss

    def loss(self, taps: Taps) -> Tensor:
        return self._loss(taps.student - taps.teacher)

    def measure(self, taps: Taps) -> tuple[float, float]:
        return 2 * next(self.measures), 2.0


def learn(
    learning: Learning,
    steps: int,
    measures: list[float] | None = None,
    batch: int = 2,
    train: int = 5,
    seed: int = 0,
    loss: Callable[[Tensor], Tensor] = lambda x: x.mean(),
    choose: str = "held_out",
) -> tuple[Fitted, Number, Adding]:
    window, number = Adding(), Number()
    held_out = batch if measures else 0
    rows = torch.arange(train + held_out).float().view(-1, 1, 1).expand(-1, 3, 8).clone()
    data = Data(rows, rows.clone(), torch.ones(train + held_out, 3), NONE.expand(train + held_out, 3), train, held_out)
    schedule = Schedule(steps, batch, max(1, len(measures or [0, 0]) - 1), lambda role: learning, seed, choose)
    fitted = fit(window, {window.slots[0]: number}, Told(measures or [], loss), None, data, schedule, Stage())
    return fitted, number, window


def learning(optimizer: str = "sign_sgd", rate: float = 0.1, per: str = "step", schedule: str = "linear") -> Learning:
    return Learning.model_validate({"optimizer": optimizer, "rate": rate, "per": per, "schedule": schedule})


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "constant": lambda share: 1.0,
}


@pytest.mark.parametrize(("schedule", "expected"), [("linear", 0.55), ("cosine", 0.55)])
def test_a_schedule_falls_to_the_share_that_is_asked(schedule: str, expected: float) -> None:
    asked = Learning.model_validate({"optimizer": "adam", "rate": 2.0, "schedule": schedule, "end": 0.1})
    assert [rate_at(asked, step, 10) for step in (0, 5)] == pytest.approx([2.0, 2 * expected])
    assert rate_at(asked, 10, 10) == pytest.approx(0.2)


@pytest.mark.parametrize("per", ["step", "fit"])
@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("optimizer", ["sign_sgd", "adam", "lion"])
def test_each_step_moves_by_the_rate_of_its_place(optimizer: str, schedule: str, per: str) -> None:
    # The slope is one at every step: SignSGD and Lion move by the rate, and so does Adam, whose moments agree.
    _, number, _ = learn(learning(optimizer, 0.3, per, schedule), steps=9)
    first = 0.3 / 9 if per == "fit" else 0.3
    moves = [a - b for a, b in zip(number.seen, [*number.seen[1:], float(number.p.detach())], strict=True)]
    assert moves == pytest.approx([first * SHAPES[schedule](t / 9) for t in range(9)], rel=1e-4)
    assert number.progress == [t / 9 for t in range(9)]
    assert number.bounded == [*number.seen[1:], float(number.p.detach())]  # after each step, once


@pytest.mark.parametrize(
    ("measures", "kept"),
    [
        ([5, 4, 3, 2, 1], 8),
        ([5, 1, 3, 2, 4], 2),
        ([1, 4, 3, 2, 5], 0),
        ([5, 4, 2, 2, 3], 4),
        ([9, 8, math.nan, 7, 8], 6),
        ([math.nan, 8, 7, math.nan, 8], 4),
    ],
)
def test_the_iterate_of_the_least_held_out_measure_is_kept(measures: list[float], kept: int) -> None:
    fitted, number, _ = learn(learning(), steps=8, measures=measures)
    assert [step for step, _ in fitted.course.held_out] == [0, 2, 4, 6, 8]
    assert [value for _, value in fitted.course.held_out] == pytest.approx(measures, nan_ok=True)
    assert fitted.course.kept == kept
    moved = -sum(0.1 * (1 - t / 8) for t in range(kept))
    assert float(number.p.detach()) == pytest.approx(moved, abs=1e-6)
    (quantized,) = fitted.quantized.values()
    assert quantized.scale[0, 0].item() == pytest.approx(1 + moved, abs=1e-6)


def test_the_iterate_of_the_least_batch_or_the_last_may_be_kept_whatever_held_out_rows_say() -> None:
    measures, loss = [1.0, 2.0, 3.0], lambda x: (x.mean() + 0.25).abs()
    fitted, number, _ = learn(learning(schedule="cosine"), 8, measures, loss=loss, choose="batch")
    assert [value for _, value in fitted.course.held_out] == measures
    losses = fitted.course.losses
    assert 0 < fitted.course.kept == losses.index(min(losses)) < 8
    assert abs(float(number.p.detach()) + 0.25) == pytest.approx(min(losses), abs=1e-6)
    fitted, number, _ = learn(learning(), 8, measures, choose="last")
    assert fitted.course.kept == 8
    assert float(number.p.detach()) == pytest.approx(-0.1 * 4.5, abs=1e-6)


def test_fresh_rows_come_once_after_those_there_are() -> None:
    window, number = Adding(), Number()

    def data(first: int, count: int) -> Data:
        rows = torch.arange(first, first + count).float().view(-1, 1, 1).expand(-1, 3, 8).clone()
        weights = torch.ones(count, 3)
        weights[:, 0] = 0
        return Data(rows, rows.clone(), weights, NONE.expand(count, 3), count, 0)

    schedule = Schedule(4, 2, 1, lambda role: learning(), 0, until_flat=True)
    fresh = iter([data(10, 4), data(20, 4), data(30, 4)])
    fitted = fit(window, {window.slots[0]: number}, Told([]), None, data(0, 3), schedule, Stage(), 1, fresh)
    assert window.batches == [[0, 1], [10, 11], [12, 13], [20, 21]]  # a batch that is not whole is left out
    assert fitted.tokens == 4 * 2 * 2
    assert float(number.p.detach()) == pytest.approx(-0.4)  # nothing is held out: the rate stays as it is


@pytest.mark.parametrize("again", [False, True])
def test_a_steps_rows_are_on_the_device_wherever_they_are_kept(again: bool) -> None:
    kept, device = torch.zeros(4, 3, 8), torch.device("meta")
    weights, following = torch.ones(4, 3, device=device), NONE.expand(4, 3).to(device)
    data = Data(kept, kept.clone(), weights, following, 4, 0)
    schedule, tokens = Schedule(3, 2, 1, lambda role: learning(), 0), torch.zeros((), dtype=torch.int64, device=device)
    with closing(batches_of(data, schedule, None if again else iter([data]), tokens)) as batches:
        for part in islice(batches, 3):  # without `again` the third is one of the fresh ones
            assert [each.device for each in (part.inputs, part.targets, part.weights, part.following)] == [device] * 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_batches_go_on_after_those_of_the_steps_that_are_done(again: bool, done: int) -> None:
    rows = torch.arange(40.0).view(40, 1, 1)
    data = Data(rows, -rows, torch.ones(40, 1), NONE.expand(40, 1), 36, 4)
    schedule = Schedule(8, 3, 1, lambda role: learning(), 0)

    def batches(done: int, count: int) -> tuple[list[list[float]], int]:
        tokens = torch.zeros((), dtype=torch.int64)
        fresh = None if again else iter([data])
        with closing(batches_of(data, schedule, fresh, tokens, done)) as found:
            return [part.inputs.flatten().tolist() for part in islice(found, count)], int(tokens)

    whole, tokens = batches(0, 8)
    assert batches(done, 8 - done) == (whole[done:], tokens)


def test_ranks_do_not_share_what_learns_nothing(skeleton: Skeleton) -> None:
    window = last_window(skeleton)
    made = window.quantizers(QUANTIZERS["rtn"], lambda _: GRID, STARTS["minmax"])
    assert type(_learner(window, made, Ranks(0, 2))) is Alone


@pytest.mark.parametrize(("checks", "held_out"), [(1, 2), (3, 2), (4, 0)])
@pytest.mark.parametrize(("rate", "per"), [(0.1, "step"), (2.0, "fit")])
def test_rates_stay_and_fall_to_nothing_after_four_fifths_however_seldom_rows_are_asked(
    checks: int, held_out: int, rate: float, per: str
) -> None:
    window, number = Adding(), Number()
    rows = torch.zeros(44, 3, 8)
    data = Data(rows, rows, torch.ones(44, 3), NONE.expand(44, 3), 44 - held_out, held_out)
    schedule = Schedule(20, 2, checks, lambda role: learning(rate=rate, per=per), 0, "last", until_flat=True)
    fit(window, {window.slots[0]: number}, Told([9, 5, 1, 0.1, 0.01]), None, data, schedule, Stage(), 1, iter([]))
    learned = [p for p, at in zip(number.seen, number.progress, strict=True) if at < 1]
    moved = [before - after for before, after in zip(learned, [*learned[1:], float(number.p.detach())], strict=True)]
    assert moved == pytest.approx([0.1] * 17 + [0.075, 0.05, 0.025], abs=1e-6)


def test_a_window_of_which_nothing_is_quantized_is_fitted_at_once() -> None:
    rows = torch.zeros(4, 3, 8)
    data = Data(rows, rows, torch.ones(4, 3), NONE.expand(4, 3), 2, 2)
    fitted = fit(Adding(), {}, Told([]), None, data, Schedule(3, 2, 1, lambda role: learning(), 0), Stage())
    assert fitted.quantized == {}
    assert fitted.course.losses == []


def test_the_weights_that_are_measured_are_those_of_the_end() -> None:
    _, number, _ = learn(learning(), steps=4, measures=[3, 2, 1])
    assert number.progress == [1.0, 0.0, 0.25, 1.0, 0.5, 0.75, 1.0]


def test_with_no_rows_held_out_the_last_iterate_is_kept() -> None:
    fitted, number, _ = learn(learning(), steps=8)
    assert fitted.course.held_out == []
    assert fitted.course.kept == 8
    assert float(number.p.detach()) == pytest.approx(-0.1 * 4.5, abs=1e-6)


@pytest.mark.parametrize(("rows", "batch"), [(5, 2), (6, 3), (7, 7), (3, 8), (1, 2)])
def test_every_row_is_used_once_before_any_is_used_twice(rows: int, batch: int) -> None:
    _, _, window = learn(learning(), steps=3 * rows, batch=batch, train=rows)
    assert all(len(used) == batch for used in window.batches)
    used = [row for rows_of_a_step in window.batches for row in rows_of_a_step]
    assert len(used) == 3 * rows * batch
    rounds = [used[i : i + rows] for i in range(0, len(used), rows)]
    assert all(sorted(once) == list(range(rows)) for once in rounds)
    if rows > 3:
        assert len({tuple(once) for once in rounds}) > 1


def test_held_out_rows_are_not_learned_from() -> None:
    _, _, window = learn(learning(), steps=20, measures=[2, 1], train=5)
    asked = [batch for batch in window.batches if min(batch) >= 5]
    assert asked == [[5, 6], [5, 6]]
    assert all(max(batch) < 5 for batch in window.batches if batch not in asked)


@pytest.mark.parametrize("measures", [None, [3.0, 2.0]])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["sign_sgd", "adam", "lion"])
def test_a_parameter_that_is_no_number_is_refused_by_the_layers_name(
    optimizer: str, wrong: float, measures: list[float] | None
) -> None:
    with pytest.raises(MachineError, match=r"model\.layers\.0\.mlp\.up_proj.*no longer a finite number") as refused:
        learn(learning(optimizer), steps=4, measures=measures, loss=lambda x: x.mean() * wrong)
    assert "smaller learning rate" in refused.value.remedy
    assert refused.value.exit_code == 1


def test_losses_are_those_of_each_step_and_the_stage_hears_of_them() -> None:
    heard: list[float] = []

    class Heard(Stage):
        def advance(self, units: float = 1, detail: str = "") -> None:
            heard.append(units)

    window, number = Adding(), Number()
    rows = torch.zeros(4, 3, 8)
    data = Data(rows, rows + 2, torch.ones(4, 3), NONE.expand(4, 3), 4, 0)
    schedule = Schedule(3, 2, 1, lambda role: learning(rate=0.3), 0)
    fitted = fit(window, {window.slots[0]: number}, Told([]), None, data, schedule, Heard(), units=2.5)
    assert fitted.course.losses == pytest.approx([-2.0, -2.3, -2.5])
    assert heard == [2.5, 2.5, 2.5]


def test_measure_is_the_mean_over_held_out_rows_in_batches() -> None:
    window, number = Adding(), Number()
    rows = torch.arange(7.0).view(7, 1, 1).expand(-1, 3, 8).clone()
    data = Data(rows, torch.zeros_like(rows), torch.ones(7, 3), NONE.expand(7, 3), 4, 3)
    weights = weights_of({window.slots[0]: number}, 1.0)
    found = measure(window, weights, OBJECTIVES["mse"](), None, data, batch=2)
    assert window.batches == [[4, 5], [6]]
    assert found == pytest.approx((16 + 25 + 36) / 3)


def test_sign_sgd_moves_by_the_sign_alone() -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = SignSGD([{"params": [p], "lr": 0.25}])
    p.grad = torch.tensor([1e-9, -1e9, 0.0])
    optimizer.step()
    assert p.tolist() == [0.75, 1.25, 1.0]


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_lion_is_the_published_formula(decay: float) -> None:
    """Chen et al., 2023, algorithm 2, with GSQ's betas; rates and slopes change from step to step."""
    start, slopes = np.linspace(-1, 1, 7), np.random.default_rng(0).normal(size=(20, 7))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    own = Learning(optimizer="lion", rate=1, schedule="constant", decay=decay)
    optimizers = Optimizers([("weight", p)], lambda role: own)
    expected, m = start, np.zeros(7)
    for step, gradient in enumerate(slopes):
        rate = 0.01 * (step + 1)
        p.grad = torch.from_numpy(gradient.copy())
        optimizers.step(lambda learning, rate=rate: rate * learning.rate)
        expected = expected - rate * (np.sign(0.9 * m + 0.1 * gradient) + decay * expected)
        m = 0.95 * m + 0.05 * gradient
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-12)
        assert p.grad is None


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-10])
def test_adam_goes_the_same_way_however_small_the_loss_is(size: float) -> None:
    """A mean squared error shrinks with the square of the hidden states, which are small in a model's first blocks."""
    slopes, own = (
        np.random.default_rng(0).normal(size=(20, 7)),
        Learning(optimizer="adam", rate=1e-2, schedule="constant"),
    )
    paths = []
    for by in (1.0, size):
        p = nn.Parameter(torch.zeros(7))
        optimizers = Optimizers([("scale", p)], lambda role: own)
        for gradient in slopes:
            p.grad = torch.from_numpy(by * gradient).float()
            optimizers.step(lambda learning: learning.rate)
        paths.append(p.detach())
    assert torch.allclose(*paths, rtol=1e-3, atol=0)


def test_moments_are_the_mean_outer_products_of_what_each_slot_reads(skeleton: Skeleton, data: Data) -> None:
    window = Window(skeleton, range(1, 3), skeleton.calls(TOKENS), lambda slot: slot.name.endswith("o_proj.weight"))
    hidden = data.inputs[:5]
    found = window.moments(hidden, batch=2)
    assert set(found) == set(window.slots)
    read: dict[str, Tensor] = {}
    hooks = []
    for block in window.blocks:
        for name, module in skeleton.blocks[block].named_modules():
            if isinstance(module, nn.Linear):
                key = f"{block}.{name}.weight"
                hooks.append(module.register_forward_pre_hook(lambda _, x, key=key: read.update({key: x[0]})))
    window.forward(hidden, {})
    for hook in hooks:
        hook.remove()
    for slot in window.slots:
        x = read[f"{slot.block}.{slot.key}"].flatten(0, -2).double()
        assert torch.allclose(found[slot].double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    by_name = {slot.name.split(".")[-2] + str(slot.block): total for slot, total in found.items()}
    assert by_name["q_proj1"] is by_name["v_proj1"]
    assert by_name["q_proj1"] is not by_name["q_proj2"]
    assert not skeleton.blocks[1]._forward_pre_hooks


# ---- on a GPU, which is to have its next work before it is done with the last


class Asking(Stage):
    """Has torch say of every wait for the GPU, from the third step to the one before the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0

    def advance(self, units: float = 1, detail: str = "") -> None:
        self.done += 1
        torch.cuda.set_sync_debug_mode("warn" if 2 <= self.done < self.steps - 1 else "default")

    def close(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU")
@pytest.mark.parametrize(("objective", "waits"), [("mse", 0), ("lfq", 2)])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("method", ["flexround", "signround"])
def test_a_step_does_not_wait_for_the_gpu(
    method: str, recorded: bool, objective: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By LFQ only to know how many positions count, once for the hidden states and once for the head."""
    monkeypatch.setattr(learnable, "RECORDED_WEIGHTS", learnable.RECORDED_WEIGHTS if recorded else 0)
    skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device("cuda"), torch.float32)
    ids, hidden, targets = last_block(skeleton, TRAIN + HELD_OUT, TOKENS)
    following = ids.roll(-1, 1).to("cuda")
    data = Data(hidden, targets, (following % 3 > 0).float(), following, TRAIN, HELD_OUT)
    window, steps = last_window(skeleton), 12
    quantizers = window.quantizers(QUANTIZERS[method], lambda _: GRID, STARTS["minmax"])
    schedule, stage = Schedule(steps, 4, 1, Recipe(method=method).learning_of, 0), Asking(steps)
    with warnings.catch_warnings(record=True) as said, closing(stage):
        warnings.simplefilter("always")
        fit(window, quantizers, OBJECTIVES[objective](), skeleton.head(), data, schedule, stage)
    found = [str(warning.message) for warning in said if "synchronizing CUDA operation" in str(warning.message)]
    assert stage.done == steps
    assert len(found) == waits * (steps - 3), found
