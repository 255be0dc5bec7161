"""Which bits each layer has: within the size, where they save most, and refused where that is no better."""

import itertools
import random
from pathlib import Path

import pytest
from test_pipeline import Listener, folder, recipe, text  # noqa: F401

import logitwise
from logitwise import allocation
from logitwise.allocation import allocate, spread_evenly
from logitwise.errors import InputError, RecipeError
from logitwise.recipe import Recipe
from logitwise.runfolder import RunFolder
from logitwise.sensitivity import Sensitivity, Together
from logitwise.skeleton import Slot
from logitwise.source import QuantizedFolder, open_source


def layers(losses: list[dict[int, float]], weights: int = 64) -> list[Together]:
    found = []
    for index, loss in enumerate(losses):
        slot = Slot(f"model.layers.{index}.up.weight", "up.weight", index, 8, weights // 8)
        found.append(Together((slot,), {bits: bits * weights for bits in loss}, loss))
    return found


def total(found: list[Together], bits: dict[Slot, int]) -> tuple[int, float]:
    """Size and loss of a choice."""
    chosen = [(one, bits[one.slots[0]]) for one in found]
    return sum(one.stored[count] for one, count in chosen), sum(one.loss[count] for one, count in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_the_same_size_loses_less_where_each_bit_saves_less_than_the_one_before(seed: int) -> None:
    rng = random.Random(seed)
    found = layers([{bits: rng.uniform(0.1, 2) * rng.uniform(3, 5) ** -bits for bits in (2, 3, 4)} for _ in range(6)])
    found = [one for one in found if 2 * one.loss[3] < one.loss[2] + one.loss[4] and one.loss[4] < one.loss[3]]
    assert len(found) > 2
    for size in range(2 * 64 * len(found), 4 * 64 * len(found) + 1, 64):
        stored, loss = total(found, allocate(found, size))
        choices = itertools.product((2, 3, 4), repeat=len(found))
        every = [total(found, {one.slots[0]: b for one, b in zip(found, bits, strict=True)}) for bits in choices]
        assert stored <= size
        assert loss == pytest.approx(min(other for taken, other in every if taken <= size))


def test_bits_that_save_nothing_are_not_given() -> None:
    found = layers([{2: 1.0, 3: 1.5, 4: 1.2}, {2: 1.0, 3: 0.9, 4: 0.2}])
    assert list(allocate(found, 10**6).values()) == [2, 4]


def test_more_bits_of_the_same_size_are_given() -> None:
    """GGUF has one type for several numbers of bits."""
    (first, *_) = layers([{2: 1.0, 3: 0.5, 4: 0.3, 6: 0.1}])
    found = [Together(first.slots, {2: 288, 3: 288, 4: 288, 6: 544}, first.loss)]
    assert list(allocate(found, 300).values()) == [4]
    assert list(allocate(found, 600).values()) == [6]


def test_a_step_that_does_not_fit_leaves_room_for_a_smaller_one() -> None:
    large, small = layers([{2: 9.0, 3: 1.0}], 640)[0], layers([{2: 1.0, 3: 0.9}, {2: 1.0, 3: 0.9}], 64)[1]
    bits = allocate([large, small], 2 * 704 + 64)
    assert bits == {large.slots[0]: 2, small.slots[0]: 3}


def test_spread_evenly_is_flat_where_that_is_the_size() -> None:
    found = layers([{2: 1.0, 3: 0.5, 4: 0.1}] * 9)
    for bits in (2, 3, 4):
        assert set(spread_evenly(found, bits * 64 * 9).values()) == {bits}


def test_spread_evenly_over_the_depth() -> None:
    found = layers([{2: 1.0, 3: 0.5, 4: 0.1}] * 12)
    bits = list(spread_evenly(found, int(2.5 * 64 * 12)).values())
    assert sorted(bits) == [2] * 6 + [3] * 6
    assert sum(bits[:6]) == sum(bits[6:]) == 15
    for size in range(2 * 64 * 12, 4 * 64 * 12, 40):
        assert abs(total(found, spread_evenly(found, size))[0] - size) <= 32


# ---- in a run


def asked(text: Path, **changes: object) -> Recipe:  # noqa: F811
    return recipe(text, **{"bits": 4, "target_bits": 4.6, "method": "rtn", "objective": "mse", **changes})


def test_a_run_gives_each_layer_its_bits(folder: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    heard = Listener()
    result = logitwise.quantize(folder, tmp_path / "out", asked(text), watcher=heard)
    made = open_source(tmp_path / "out")
    assert isinstance(made, QuantizedFolder)
    grids = {name: grid for name in made.names() if (grid := made.grid(name))}
    assert len({grid.bits for grid in grids.values()}) > 1
    assert all(grid.symmetric for grid in grids.values())
    assert {name.removesuffix(".weight"): grid.bits for name, grid in grids.items()} == (
        result.report["allocation"]["bits"]
    )
    assert result.report["bits_per_weight"] == pytest.approx(result.report["allocation"]["bits_per_weight"])
    assert 4.3 < result.report["bits_per_weight"] <= 4.6
    assert any(sentence.startswith("bits where they matter: ") for sentence in heard.said)
    kl = result.report["allocation"]["held_out_kl"]
    assert kl["allocated"] < kl["evenly"]
    for block in range(2):
        of = {name.split(".")[-2]: grid.bits for name, grid in grids.items() if f"layers.{block}." in name}
        assert of["q_proj"] == of["k_proj"] == of["v_proj"]
        assert of["gate_proj"] == of["up_proj"]


def test_what_was_measured_is_not_measured_again(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = logitwise.quantize(folder, tmp_path / "out", asked(text), keep_run=True)

    def never(*given: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Sensitivity, "of_layers", never)
    again = logitwise.quantize(folder, tmp_path / "out", asked(text), keep_run=True, overwrite=True)
    assert again.report["allocation"] == first.report["allocation"]
    with pytest.raises(AssertionError, match="measured again"):
        logitwise.quantize(folder, tmp_path / "out", asked(text, target_bits=4.7), keep_run=True, overwrite=True)


def test_no_better_than_spread_evenly_is_refused(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allocation, "allocate", spread_evenly)
    with pytest.raises(RecipeError, match=r"4.6 finds no better bits.*\n.*KL .*spread evenly.*\n.*--bits"):
        logitwise.quantize(folder, tmp_path / "out", asked(text), run_folder=tmp_path / "run")
    assert not (tmp_path / "out").exists()
    assert RunFolder(tmp_path / "run").path.exists()  # what was measured is kept for another target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_bits": 2.1},
            r"2.1 cannot be met\n.*2 bits take 4.000 bits a weight, those at 4 take 6.000",
        ),
        ({"bits": 3}, r"bits is not read\n.*--target-bits gives each layer"),
        ({"layers": {"*": {"bits": 3}}}, r"layers is not read\n.*--target-bits gives each layer"),
        ({"target_bits": None, "bits": 3, "sensitivity": "lim"}, r"sensitivity is not read\n.*no --target-bits"),
        ({"symmetric": False}, r"no format holds this grid\n.*only where all are symmetric"),
        (
            {"target_bits": None, "layers": {"*nope": {"bits": 3}}},
            r"\[layers\] \*nope names no layer.*\n.*\n.*one is",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_given_is_refused_before_the_work(
    changes: dict[str, object],
    message: str,
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        logitwise.quantize(folder, tmp_path / "out", asked(text).but(**changes))
    assert not list(tmp_path.iterdir())


def test_bits_spread_evenly_are_a_control(folder: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    heard = Listener()
    result = logitwise.quantize(folder, tmp_path / "out", asked(text, sensitivity="even"), watcher=heard)
    found = result.report["allocation"]
    assert found["bits_per_weight"] == found["evenly_bits_per_weight"] == result.report["bits_per_weight"]
    assert found["held_out_kl"] == {}
    assert any(sentence.startswith("bits spread evenly: ") for sentence in heard.said)


@pytest.mark.parametrize("method", ["rtn", "flexround"])
def test_layers_have_the_grids_that_the_recipe_names(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    method: str,
) -> None:
    grids = {"*mlp*": {"bits": 4}, "*down_proj": {"bits": 3, "group_size": "channel"}}
    made = recipe(text, method=method, objective="mse" if method == "rtn" else "lfq", layers=grids)
    result = logitwise.quantize(folder, tmp_path / "out", made)
    read = open_source(tmp_path / "out")
    assert isinstance(read, QuantizedFolder)
    for name in read.names():
        grid = read.grid(name)
        if grid:
            expected = (3, None) if "down" in name else (4, 16) if "mlp" in name else (2, 16)
            assert (grid.bits, grid.group_size, grid.symmetric) == (*expected, True)
    assert result.choices["symmetric"].value is True
    assert len(result.report["grids"]) == 3
