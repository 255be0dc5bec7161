"""Several processes, one run: what each adds is what one process has, and a run survives the loss of one."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MemorySource, last_block, tiny_model
from killable import HEARD, QUANTIZE, contents, heard_by, make_model, start, start_ranks
from rank_environment import as_rank, free_port
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from logitwise import descent
from logitwise.descent import Halfway, Schedule
from logitwise.errors import MachineError, RecipeError
from logitwise.fit import Data, Fitted, Window, fit, measure
from logitwise.grid import Grid, Quantized
from logitwise.launch import threads_each
from logitwise.objectives import OBJECTIVES
from logitwise.optimizers import Optimizers
from logitwise.preflight import check_shared
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.ranks import ALONE, Ranks, joined
from logitwise.recipe import Recipe
from logitwise.sharing import owners, rows_of
from logitwise.skeleton import Skeleton, Slot
from logitwise.watch import Stage

TOKENS, TRAIN, HELD_OUT = 11, 7, 5
GRADIENTS = threading.local()

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each process has a GPU of its own")


# ---- in threads: the sums are exact, so that only the order of additions differs


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.given: list[list[Tensor]] = [[] for _ in range(world)]
        self.said: list[Any] = [None] * world

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        """What each rank's work gives."""

        def of(rank: int) -> Any:
            try:
                return work(_Thread(rank, self))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(of, range(self.world)))


class _Thread(Ranks):
    def __init__(self, rank: int, threads: Threads) -> None:
        super().__init__(rank, threads.world)
        self.threads = threads

    def _everyones(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        own = list(tensors)
        self.threads.given[self.rank] = [tensor.detach().clone() for tensor in own]
        self.threads.barrier.wait()
        found = list(zip(own, zip(*self.threads.given, strict=True), strict=True))
        self.threads.barrier.wait()
        yield from ((tensor, list(of_all)) for tensor, of_all in found)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor, of_all in self._everyones(tensors):
            tensor.copy_(torch.stack(of_all).sum(0))

    def give(self, tensors: Iterable[tuple[int, Tensor]]) -> None:
        ranks, own = zip(*tensors, strict=True)
        for rank, (tensor, of_all) in zip(ranks, self._everyones(own), strict=True):
            tensor.data.copy_(of_all[rank])

    def exchange(self, rows: Tensor) -> None:
        ((_, of_all),) = self._everyones([rows])
        for rank, other in enumerate(of_all):
            rows[rank].copy_(other[rank])

    def sum_own(self, rows: Tensor) -> None:
        ((_, of_all),) = self._everyones([rows])
        rows.copy_(torch.full_like(rows, torch.nan))
        rows[self.rank] = torch.stack(of_all).sum(0)[self.rank]

    def everyones(self, value: Any) -> list[Any]:
        self.threads.said[self.rank] = value
        self.threads.barrier.wait()
        found = list(self.threads.said)
        self.threads.barrier.wait()
        return found


@pytest.fixture(scope="module")
def skeletons() -> list[Skeleton]:
    """One for each thread, since a module's parameters are replaced while it runs."""
    return [Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32) for _ in range(3)]


def shared(skeleton: Skeleton, ranks: Ranks) -> Data:
    """This rank's rows of the last block's data; positions count unequally."""
    ids, hidden, targets = last_block(skeleton, TRAIN + HELD_OUT, TOKENS)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4))
    weights[weights < 0.4] = 0
    parts = (hidden, targets, weights.to(skeleton.device), ids.roll(-1, 1).to(skeleton.device))
    own = [torch.cat([x[:TRAIN][ranks.share(TRAIN)], x[TRAIN:][ranks.share(HELD_OUT)]]) for x in parts]
    return Data(*own, ranks.count(TRAIN), ranks.count(HELD_OUT), ranks)


class Watched(Optimizers):
    """Keeps the gradients of a thread's first step."""

    def __init__(self, parameters: Any, learning: Any) -> None:
        self.watched = [parameter for _, parameter in parameters]
        GRADIENTS.first = {}
        super().__init__(parameters, learning)

    def step(self, rate: Any) -> None:
        GRADIENTS.first = GRADIENTS.first or {parameter: parameter.grad.clone() for parameter in self.watched}
        super().step(rate)


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the gradients of the first step."""
    monkeypatch.setattr(descent, "Optimizers", Watched)


def first_step(skeleton: Skeleton, objective: str, settings: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One step on all rows that there are."""
    window, data = Window(skeleton, range(2, 3), skeleton.calls(TOKENS), lambda slot: False), shared(skeleton, ranks)
    quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: Grid(3, 16, False), STARTS["minmax"])
    made, head = OBJECTIVES[objective](**settings), skeleton.head()
    schedule = Schedule(1, data.train, 1, Recipe(method="flexround").learning_of, 0)
    fitted = fit(window, quantizers, made, head, data, schedule, Stage())
    judged = measure(window, {}, made, head, data, 2)
    of_slots = {
        slot: [GRADIENTS.first[p] for p in quantizer.parameters() if p in GRADIENTS.first]
        for slot, quantizer in quantizers.items()
    }
    gradients = {slot: own for slot, own in of_slots.items() if own}
    return {"gradients": gradients, "course": vars(fitted.course), "tokens": fitted.tokens, "judged": judged}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("objective", "settings"),
    [("mse", {}), ("lfq", {}), ("mixed", {"share": 0.7}), ("hard_labels", {"prompts": True}), ("topk", {"k": 8})],
)
def test_the_first_step_is_that_of_one_process(
    objective: str, settings: dict[str, Any], world: int, skeletons: list[Skeleton], gradients: None
) -> None:
    one = first_step(skeletons[0], objective, settings, ALONE)
    others = Threads(world).run(lambda ranks: first_step(skeletons[ranks.rank], objective, settings, ranks))
    of_slots: dict[Slot, list[Tensor]] = {}
    for other in others:
        assert of_slots.keys().isdisjoint(other["gradients"])  # each has one owner
        of_slots |= other["gradients"]
    assert of_slots.keys() == one["gradients"].keys()
    for slot, expected in one["gradients"].items():
        for gradient, exact in zip(of_slots[slot], expected, strict=True):
            assert float((gradient - exact).norm()) <= 1e-5 * float(exact.norm()) > 0
    for other in others:
        assert other["course"]["losses"] == pytest.approx(one["course"]["losses"], rel=1e-5)
        assert [kl for _, kl in other["course"]["held_out"]] == pytest.approx(
            [kl for _, kl in one["course"]["held_out"]], rel=1e-3
        )
        assert other["judged"] == pytest.approx(one["judged"], abs=1e-9)
        assert other["tokens"] == one["tokens"]


class Stopped(Exception):
    """Ends a fit in the middle."""


class Kept:
    """How far a fit is, kept in memory; of ranks, by the first."""

    def __init__(self) -> None:
        self.found: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def halfway(self) -> Halfway:
        def save(tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
            if tensors:
                self.found = {name: tensor.clone() for name, tensor in tensors.items()}, figures

        return Halfway(lambda: True, save, lambda: self.found)


def twelve_steps(skeleton: Skeleton, ranks: Ranks, kept: Kept | None = None, stop: int = 13) -> tuple[Fitted, int]:
    """The last block by LFQ, and how many steps were taken; stopped before the so manyth."""
    window, data = Window(skeleton, range(2, 3), skeleton.calls(TOKENS), lambda slot: False), shared(skeleton, ranks)
    quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: Grid(3, 16, False), STARTS["minmax"])
    stage = Counting(stop)
    schedule = Schedule(12, 2, 4, Recipe(method="flexround").learning_of, 0)
    halfway = kept and kept.halfway()
    made = fit(window, quantizers, OBJECTIVES["lfq"](), skeleton.head(), data, schedule, stage, halfway=halfway)
    for slot, quantizer in quantizers.items():  # whoever learned it, all have it
        assert_equal(quantizer.freeze(), made.quantized[slot])
    return made, stage.steps


class Counting(Stage):
    def __init__(self, stop: int) -> None:
        self.steps, self.stop = 0, stop

    def advance(self, units: float = 1) -> None:
        self.steps += units == 1
        if self.steps == self.stop:
            raise Stopped


def assert_equal(one: Quantized, other: Quantized) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parts(), other.parts(), strict=True))


def test_all_ranks_come_to_the_same_and_go_on_where_they_were(skeletons: list[Skeleton]) -> None:
    def run(ranks: Ranks, kept: Kept | None, stop: int = 13) -> tuple[Fitted, int] | None:
        with suppress(Stopped):
            return twelve_steps(skeletons[ranks.rank], ranks, kept, stop)
        return None

    kept = Kept()
    whole, other = Threads(2).run(lambda ranks: run(ranks, None))
    assert whole[1] == 12
    assert Threads(2).run(lambda ranks: run(ranks, kept, 11)) == [None, None]
    again, _ = Threads(2).run(lambda ranks: run(ranks, kept))
    assert again[1] == 3  # from the ninth, the last that was asked about
    assert whole[0].course == other[0].course == again[0].course
    for slot, quantized in whole[0].quantized.items():
        assert_equal(other[0].quantized[slot], quantized)
        assert_equal(again[0].quantized[slot], quantized)
    # Another number of ranks has other parts of it, and so begins anew.
    assert [found[1] for found in Threads(3).run(lambda ranks: run(ranks, kept))] == [12] * 3
    assert twelve_steps(skeletons[0], ALONE, kept)[1] == 12


def test_what_is_no_number_on_one_rank_is_said_by_all(skeletons: list[Skeleton]) -> None:
    def refused(ranks: Ranks) -> str:
        skeleton = skeletons[ranks.rank]
        window = Window(skeleton, range(2, 3), skeleton.calls(TOKENS), lambda slot: False)
        quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: Grid(3, 16, False), STARTS["minmax"])
        last = list(quantizers)[-1]
        next(quantizers[last].parameters()).data.fill_(torch.nan)
        schedule = Schedule(1, 2, 1, Recipe(method="flexround").learning_of, 0)
        with pytest.raises(MachineError) as error:
            fit(window, quantizers, OBJECTIVES["mse"](), None, shared(skeleton, ranks), schedule, Stage())
        assert last.name in error.value.what
        return error.value.what

    assert len(set(Threads(2).run(refused))) == 1


def test_owners_have_about_as_much_to_do() -> None:
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    slots = [Slot(f"{index}.weight", f"{index}.weight", 0, *shape) for index, shape in enumerate(shapes)]
    whole = sum(out * inputs for out, inputs in shapes)
    for world, most in ((2, 0.54), (4, 0.28), (16, 0.28)):
        owned = owners(slots, world)
        loads = [sum(s.out_features * s.in_features for s in slots if owned[s] == rank) for rank in range(world)]
        assert max(loads) <= most * whole


def test_every_slot_has_a_place_of_its_own_in_the_row_of_its_owner() -> None:
    shapes = [(3, 4), (5, 2), (1, 7), (6, 6)]
    slots = [Slot(f"{index}.weight", f"{index}.weight", 0, *shape) for index, shape in enumerate(shapes)]
    owner = dict(zip(slots, (0, 2, 0, 2), strict=True))
    rows, views = rows_of(owner, 4, torch.float32, torch.device("cpu"))
    assert rows.shape == (4, 46)
    for number, (slot, view) in enumerate(views.items(), 1):
        assert view.shape == (slot.out_features, slot.in_features)
        view += number
    places = [torch.tensor([1] * 12 + [3] * 7 + [0] * 27), torch.tensor([2] * 10 + [4] * 36), torch.zeros(46)]
    assert all(torch.equal(rows[rank], places[place].float()) for rank, place in ((0, 0), (1, 2), (2, 1), (3, 2)))


def test_what_a_slot_reads_is_that_of_all_ranks(skeletons: list[Skeleton]) -> None:
    def moments(ranks: Ranks) -> dict[Any, Tensor]:
        skeleton = skeletons[ranks.rank]
        window, data = (
            Window(skeleton, range(2, 3), skeleton.calls(TOKENS), lambda slot: False),
            shared(skeleton, ranks),
        )
        return window.moments(data.inputs[: data.train], 2, ranks)

    one = moments(ALONE)
    for other in Threads(3).run(moments):
        for slot, expected in one.items():
            torch.testing.assert_close(other[slot], expected, rtol=1e-5, atol=1e-6)


def test_where_nothing_counts_there_is_no_part_of_a_mean() -> None:
    counts = {0: torch.tensor(0.0), 1: torch.tensor(3.0)}
    assert Threads(2).run(lambda ranks: float(ranks.part(counts[0]))) == [0, 0]
    assert Threads(2).run(lambda ranks: float(ranks.part(counts[ranks.rank]))) == [0, 1]


def test_ranks_that_do_not_do_the_same_are_refused() -> None:
    assert Threads(2).run(lambda ranks: ranks.refuse_others("0123456789abcdef")) == [None, None]

    def refused(ranks: Ranks) -> str:
        with pytest.raises(RecipeError) as error:
            ranks.refuse_others(f"{ranks.rank}123456789abcdef")
        return error.value.why

    for why in Threads(2).run(refused):
        assert "1 of 2 have another model" in why


def test_variables_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"RANK is not set(.|\n)*unset WORLD_SIZE"), joined():
        pass


def test_processes_share_the_cores_where_torchrun_gave_each_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    for given, here, threads in (("1", "2", 3), ("1", "8", 1), ("4", "2", None), ("1", "1", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert threads_each() == threads


def test_rows_are_shared_without_one_left_out() -> None:
    for count in (1, 4, 7):
        rows = [list(range(count))[Ranks(rank, 3).share(count)] for rank in range(3)]
        assert sorted(row for own in rows for row in own) == list(range(count))
        assert [len(own) for own in rows] == [Ranks(rank, 3).count(count) for rank in range(3)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 3}, "batch = 3 cannot be shared by 4 processes"),
        ({"polish": True, "polish_batch": 2}, "polish_batch = 2 cannot"),
        ({"held_out": 1}, "held_out = 1 cannot"),
        ({"windows": [{"blocks": (0, 1), "rows": 2}]}, "windows.0.rows = 2 cannot"),
        ({"device": "cuda:1"}, "--device cuda:1 is one device"),
    ],
)
def test_too_little_to_share_is_refused(settings: dict[str, Any], words: str) -> None:
    recipe = Recipe(**settings)
    check_shared(recipe, 1)
    with pytest.raises(RecipeError, match=words):
        check_shared(recipe, 4)


# ---- in processes, as torchrun starts them


def first_step_of_rank(rank: int, world: int, port: int, device: str, place: Path) -> None:
    """The gradients of a process's first step, into a file, by their slots' names. Of seven cores it has its share."""
    os.environ.update(as_rank(rank, world, port), OMP_NUM_THREADS="1")
    os.sched_getaffinity = lambda process: set(range(7))
    torch.set_num_threads(1)
    descent.Optimizers = Watched  # type: ignore[misc]
    with joined(device) as ranks:
        assert torch.get_num_threads() == (1 if world == 1 else 3)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device(device), dtype)
        found = first_step(skeleton, "lfq", {}, ranks)["gradients"]
    assert torch.get_num_threads() == 1
    torch.save({slot.name: [g.cpu() for g in own] for slot, own in found.items()}, place / f"{rank} of {world}.pt")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_two_gpus)])
def test_the_first_step_of_processes_is_that_of_one_alone(device: str, tmp_path: Path) -> None:
    for world in (1, 2):
        spawn(first_step_of_rank, (world, free_port(), device, tmp_path), world)
    one, *others = (torch.load(tmp_path / f"{name}.pt") for name in ("0 of 1", "0 of 2", "1 of 2"))
    assert one.keys() == others[0].keys() | others[1].keys() and others[0].keys().isdisjoint(others[1].keys())
    tolerance = 1e-5 if device == "cpu" else 2**-7  # a rounding to bfloat16 is off by 2**-9 of it at the most
    for name, own in (others[0] | others[1]).items():
        for gradient, exact in zip(own, one[name], strict=True):
            assert float((gradient - exact).norm()) <= tolerance * float(exact.norm()) > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    make_model(place)
    return place


def finish(place: Path, world: int, words: tuple[str, ...] = QUANTIZE) -> dict[str, bytes]:
    """A run of so many processes to its end."""
    for rank, process in enumerate(start_ranks(place, words, world)):
        process.join(120)
        assert process.exitcode == 0, (place / heard_by(rank)).read_text()
    made = contents(place / "out")
    shutil.rmtree(place / "out")
    assert not (place / "out.run").exists()
    return made


def test_two_processes_make_one_checkpoint_and_the_same_again(place: Path) -> None:
    """By the method with most kinds of state."""
    words = (*QUANTIZE, "--method", "gsq", "--symmetric")
    made = finish(place, 2, words)
    assert "held-out KL" in (place / heard_by(0)).read_text()
    assert not (place / heard_by(1)).read_text()
    assert finish(place, 2, words) == made


def test_a_lost_process_ends_the_run_and_another_number_goes_on(place: Path) -> None:
    first, second = start_ranks(place, (*QUANTIZE, "--set", "steps=200"), 2)
    while len([file for file in (place / "out.run").glob("*.json") if "-" not in file.stem]) < 2:
        assert first.is_alive() and second.is_alive(), (place / heard_by(0)).read_text()
        time.sleep(0.02)  # until there are the text and a block
    second.kill()
    first.join(60)
    said = (place / heard_by(0)).read_text()
    assert first.exitcode == 1
    assert "another process of this run is gone" in said and "run the same command again" in said
    assert not (place / "out").exists()
    alone = start(place, (*QUANTIZE, "--set", "steps=200"))
    alone.join(120)
    assert alone.exitcode == 0
    assert "fits were finished before" in (place / HEARD).read_text()
    shutil.rmtree(place / "out")


def test_what_is_refused_is_said_once(place: Path) -> None:
    processes = start_ranks(place, (*QUANTIZE, "--set", "batch=1"), 2)
    for process in processes:
        process.join(60)
        assert process.exitcode == 2
    assert "batch = 1 cannot be shared by 2 processes" in (place / heard_by(0)).read_text()
    assert not (place / "out.run").exists()
