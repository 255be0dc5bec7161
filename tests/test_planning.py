"""Plans: sizes as they come to be, little read of the weights, and what does not fit or cannot be shared is said."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save
from test_pipeline import TINY, folder, recipe, text  # noqa: F401
from typer.testing import CliRunner

import logitwise
from logitwise import costs, planning, probe
from logitwise.cli import app
from logitwise.costs import FITS, PROOF, ROUNDING, STORING, TEXT, Memory
from logitwise.errors import RecipeError
from logitwise.formats import FORMATS
from logitwise.grid import Quantized
from logitwise.planning import Plan
from logitwise.preflight import outline
from logitwise.probe import MadeUp, OfReading, OfText, OfWindow
from logitwise.remedies import more_memory, other_text, smaller_fit
from logitwise.report.figures import show_plan
from logitwise.skeleton import Skeleton
from logitwise.source import Source, open_source
from logitwise.windows import plan_steps

RTN = {"method": "rtn", "objective": "mse"}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
PARTS = [
    "reading and checking the model",
    "fitting blocks",
    "fitting the final blocks by lfq",
    "writing and reading back",
]


@pytest.mark.parametrize("changes", [RTN, {**RTN, "keep": ("down_proj",), "bits": 5, "symmetric": True}])
def test_sizes_are_those_of_the_checkpoint(tmp_path: Path, changes: dict[str, object]) -> None:
    model = save(random_model(llama_config(**WIDE)), tmp_path / "wide")
    asked = logitwise.Recipe.load(None, **{"group_size": 64, **changes})
    planned = logitwise.plan(model, asked)
    made = logitwise.quantize(model, tmp_path / "out", asked, keep_run=True)
    assert planned.size == pytest.approx(made.report["size_bytes"], rel=0.02)  # the headers of the files
    assert planned.bits_per_weight == pytest.approx(made.report["bits_per_weight"], rel=1e-6)
    assert planned.bits_per_parameter == pytest.approx(made.report["bits_per_parameter"], rel=0.02)
    assert planned.run_folder == pytest.approx(sum(f.stat().st_size for f in (tmp_path / "out.run").iterdir()), rel=0.2)
    fates = [fate["fate"] for fate in made.report["audit"]]
    assert (planned.quantized, planned.kept) == (fates.count("quantized"), fates.count("kept"))
    assert planned.unmet == []


def test_one_block_is_read_and_every_part_has_a_time(text: Path, tmp_path: Path) -> None:  # noqa: F811
    shapes = tmp_path / "shapes"
    config = llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=256)
    save(random_model(config), shapes)
    file = shapes / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: torch.full_like(x, torch.nan) for name, x in tensors.items() if ".layers.0." not in name}
    save_file(tensors, file, {"format": "pt"})
    planned = logitwise.plan(shapes, recipe(text))  # a run would refuse these weights
    assert [part for part in planned.seconds if part != costs.FIRST] == PARTS
    assert all(seconds > 0 for seconds in planned.seconds.values())
    polished = logitwise.plan(shapes, recipe(text, polish=True, calibration="self"))
    assert {"polishing", "writing calibration text"} <= polished.seconds.keys()


def test_engines_that_fuse_layers_on_two_grids_are_not_said_to_serve_them(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "units_of", lambda *given: None)
    monkeypatch.setattr(planning, "seconds_of", lambda *given: {costs.READING: 0.0})
    monkeypatch.setattr(planning, "memory_of", lambda *given: Memory(None, {FITS: 0}, 0))
    planned = logitwise.plan(folder, recipe(text, bits=4, keep=("layers.0.*.q_proj",)))
    why = "vLLM fuses q_proj, k_proj, v_proj of model.layers.0.self_attn, which do not lie on one grid"
    assert set(planned.splits.values()) == {why}
    assert planned.loaders.endswith(f"vLLM does not: {why}")
    console = Console(width=200, record=True)
    show_plan(console, planned)
    assert f"  1, 2, 4, 8: {why}" in console.export_text()


def test_units_are_multiplied_by_how_many_the_run_has(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks, 24 rows and 8 held out, 6 steps of 4 rows, held-out rows asked 3 times."""
    monkeypatch.setattr(costs, "of_text", lambda *given: OfText(first=1.0, prompts=3e7, token=1e3, counted=0.9, peak=5))
    monkeypatch.setattr(costs, "of_forward", lambda *given: 1.0)
    monkeypatch.setattr(costs, "of_reading", lambda *given: OfReading(checked=3e-3, again=2e-3, peak=0))
    monkeypatch.setattr(costs, "of_storing", lambda *given: 5e-2)
    counts = {name: torch.Size(open_source(folder).shape(name)).numel() for name in open_source(folder).names()}
    block = sum(count for name, count in counts.items() if ".layers.0." in name)
    projection = counts["lm_head.weight"]
    around = sum(counts.values()) - 2 * block - projection
    weights = sum(count for name, count in counts.items() if "_proj" in name)
    read_block, read_walked = 2e-3 * block, 2e-3 * (3 * around + projection)
    read_all, kept = 2e-3 * sum(counts.values()), weights / 2 / costs.WRITING
    of_last = OfWindow(first=2.0, opening=3e3, step=5e5, held_out_row=7e6, peak=9, learned=30)
    of_others = OfWindow(first=4.0, opening=1e2, step=1e4, held_out_row=1e6, peak=7, learned=20)
    monkeypatch.setattr(costs, "of_window", lambda *given: of_last if given[2].refit else of_others)
    monkeypatch.setattr(planning, "of_opening", lambda *given: 7e2)
    asked = recipe(text, calibration="self", polish=True, polish_steps=5, polish_batch=2)
    planned, short = logitwise.plan(folder, asked), logitwise.plan(folder, asked.but(steps=0, steps_last=0))
    assert planned.run_folder == short.run_folder + 30 * 32  # the state of the longest fit, and of its next check
    seconds = planned.seconds
    assert seconds[costs.FIRST] == 1 + 2 + 4
    reading = 3e-3 * sum(counts.values()) + 2e-3 * (5 * around + 2 * projection) + 2 * 2 * read_block
    fit = 1e2 + 6 * 1e4 + 3 * 8 * 1e6 + read_block + kept
    refit = 3e3 + 6 * 5e5 + 3 * 8 * 7e6 + read_block + kept
    assert seconds[costs.READING] == pytest.approx(7e2 + reading, rel=1e-12)
    text_and_model = 1e3 * (24 + 8 + 2) * 24 + 3e7 + read_all
    assert seconds["writing calibration text"] == pytest.approx(text_and_model, rel=1e-12)
    assert seconds["fitting blocks"] == pytest.approx(2 * fit + 2 * 2 * 32 * 1.0 + read_walked, rel=1e-12)
    assert seconds["fitting the final blocks by lfq"] == pytest.approx(refit + 2 * 8 * 7e6, rel=1e-12)
    stored = 2 * planned.size / costs.WRITING + 5e-2 * weights + read_all - 2e-3 * weights
    assert seconds["writing and reading back"] == pytest.approx(stored, rel=1e-12)
    monkeypatch.setattr(costs, "TRIED_ON", ("cpu",))
    tried = logitwise.plan(folder, asked).seconds
    assert tried.pop(costs.FIRST) == pytest.approx(7 + 3e3 + 2 * 5e5 + read_walked + read_block, rel=1e-12)
    assert tried == {part: taken for part, taken in seconds.items() if part != costs.FIRST}
    step, head = 1e4 / 4, 5e5 / 4 - 1e4 / 4
    polish = 5 * 2 * (2 * step + head) + 2 * (32 + 2 * 8 * 3) + 2 * read_block + read_walked
    assert seconds["polishing"] == pytest.approx(polish, rel=1e-12)


def test_a_fit_of_fewer_steps_than_checks_asks_at_each_step(folder: Path, text: Path) -> None:  # noqa: F811
    asked = recipe(text, device="cpu", compute_dtype="float32", objective="mse", steps=2, checks=10)
    work = costs.work_of(outline(folder, asked, False, None), asked)
    usual = OfWindow(first=0.0, opening=0.0, step=0.0, held_out_row=1e6, peak=0, learned=0)
    units = costs.Units(OfReading(0.0, 0.0, 0), 0.0, None, 0.0, usual, None)
    kept = work.weights / costs.WRITING
    assert costs.seconds_of(work, units, 0)["fitting blocks"] == pytest.approx(2 * 3 * 8 * 1e6 + kept, rel=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_windows_are_tried_compiled_where_the_run_compiles(
    compiled: bool,
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = list[bool]()
    true_window = probe.Window

    def window(skeleton: Any, blocks: Any, calls: Any, kept: Any, compiled: bool = False) -> Any:
        tried.append(compiled)
        return true_window(skeleton, blocks, calls, kept)

    monkeypatch.setattr(costs, "compiles", lambda skeleton, steps: compiled)
    monkeypatch.setattr(probe, "Window", window)
    logitwise.plan(folder, recipe(text))
    assert tried.pop(0) is False  # where codes are stored
    assert set(tried) == {compiled}


def test_a_tied_projection_is_the_embedding_and_what_is_around_the_blocks_has_it(tmp_path: Path) -> None:
    asked = recipe(tmp_path, device="cpu", compute_dtype="float32", **RTN)
    own, tied = (
        costs.work_of(
            outline(
                save(random_model(llama_config(tie_word_embeddings=tied)), tmp_path / str(tied)), asked, False, None
            ),
            asked,
        )
        for tied in (False, True)
    )
    assert own.projection == tied.projection
    assert own.around == tied.around > tied.projection
    assert own.parameters - tied.parameters == own.projection


def test_how_fast_a_model_is_read_is_seen_on_its_first_block(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, names = open_source(folder), list[str]()
    skeleton, read = Skeleton(source, torch.device("cpu"), torch.float32), source.read

    def slow(name: str) -> torch.Tensor:
        names.append(name)
        time.sleep(0.01)
        return read(name)

    monkeypatch.setattr(source, "read", slow)
    found = probe.of_reading(source, skeleton)
    block = [name for name in source.names() if ".layers.0." in name]
    assert set(names[:-1]) == set(block)
    assert names[-1] == largest_of(source)  # for its memory
    count = sum(torch.Size(source.shape(name)).numel() for name in block)
    least = 0.01 * len(block) / count
    assert least < found.again < 3 * least
    assert least < found.checked < 10 * least


def largest_of(source: Source) -> str:
    return max(source.names(), key=lambda name: torch.Size(source.shape(name)).numel())


def test_memory_of_reading_is_what_the_largest_tensor_takes_for_a_moment(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(folder)
    skeleton, read = Skeleton(source, torch.device("cpu"), torch.float32), source.read

    def decoded(name: str) -> torch.Tensor:
        if name != largest_of(source):
            return read(name)
        beside = torch.ones(1 << 26, dtype=torch.uint8)
        time.sleep(0.1)
        return read(name)[: len(beside)]

    monkeypatch.setattr(source, "read", decoded)
    assert probe.of_reading(source, skeleton).peak == pytest.approx(1 << 26, rel=0.1)


SMALL = OfWindow(first=0.0, opening=0.0, step=0.0, held_out_row=0.0, peak=7, learned=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("form", FORMATS)
def test_ram_is_at_least_that_of_the_largest_tensor_beside_a_shard(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    form: str,
    device: str,
) -> None:
    asked = recipe(text, device="cpu", compute_dtype="float32", streams="cpu")
    outlined = replace(outline(folder, asked, False, None), format=FORMATS[form])
    work = costs.work_of(outlined, asked.but(device=device))
    units = costs.Units(OfReading(0.0, 0.0, peak=1 << 40), 0.0, None, 0.0, SMALL, None)
    there = psutil.Process().memory_info().rss
    for size, shard in ((1 << 27, 1 << 27), (1 << 35, 1 << 29)):
        ram = costs.memory_of(outlined, work, units, size).ram
        assert ram[STORING] == pytest.approx((1 << 40) + there + (0 if form == "gguf" else shard), abs=1 << 24)
    beside = probe.bytes_of_streams(asked, outlined.skeleton, work.rows)
    of_fits = beside + ((1 << 40) + there if device == "cuda" else SMALL.peak)
    assert ram[FITS] == pytest.approx(of_fits, abs=1 << 24 if device == "cuda" else 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("block", [0, 1 << 40])
def test_memory_is_at_least_that_of_the_proof(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    block: int,
    device: str,
) -> None:
    """What is around the blocks and the projection, tied or not, in float32, with a block or the projection as read."""
    asked = recipe(text, device="cpu", compute_dtype="float32", streams="cpu")
    outlined = outline(folder, asked, False, None)
    work = replace(costs.work_of(outlined, asked.but(device=device)), around=1 << 41, projection=1 << 40, block=block)
    units = costs.Units(OfReading(0.0, 0.0, peak=5), 0.0, None, 0.0, SMALL, None)
    there = psutil.Process().memory_info().rss
    found = costs.memory_of(outlined, work, units, 0)
    of_proof = 4 * 3 * (1 << 40) + max(4 * block, outlined.source.dtype.itemsize << 40)
    if device == "cuda":
        assert found.device is not None
        assert found.device[PROOF] == of_proof
        assert PROOF not in found.ram
    else:
        assert found.device is None
        assert found.ram[PROOF] == pytest.approx(of_proof + there, abs=1 << 24)


@pytest.mark.parametrize("taken", [[0.0, 0.3, 0.2, 0.2, 0.1], [0.4, 0.4, 0.4, 0.4, 0.0]])
def test_what_a_first_answer_takes_longer_is_never_below_nothing(
    taken: list[float],
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where later ones happen to take longer, and where the long ones happen to be faster than the short ones."""
    waits = iter(taken)
    true_write = probe.write_answers

    def slower(*given: Any, **more: Any) -> Any:
        time.sleep(next(waits, 0.0))
        return true_write(*given, **more)

    monkeypatch.setattr(probe, "write_answers", slower)
    source, asked = open_source(folder), recipe(None, device="cpu", compute_dtype="float32")
    found = probe.of_text(source, asked, 2, Skeleton(source, torch.device("cpu"), torch.float32))
    assert found.first >= 0
    assert 0 < found.token < 1
    assert found.prompts >= 0


@pytest.mark.parametrize("form", FORMATS)
def test_what_storing_takes_is_seen_on_the_first_block_that_is_quantized(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lay_out = save(random_model(llama_config(**WIDE)), tmp_path / "wide"), FORMATS[form].tensors

    def slow(prefix: str, quantized: Quantized) -> dict[str, torch.Tensor]:
        assert ".layers.1." in prefix  # the first is kept
        time.sleep(0.02)
        return lay_out(prefix, quantized)

    monkeypatch.setattr(FORMATS[form], "tensors", slow)
    machine = {"device": "cpu", "compute_dtype": "float32", "bits": 4, "group_size": 32 if form == "gguf" else 64}
    asked = logitwise.Recipe.load(
        None, **{**machine, **RTN, "symmetric": form != "awq", "keep": ("layers.0",), "format": form}
    )
    outlined = outline(model, asked, False, None)
    grids = {slot.module: asked.grid_of(slot.module) for slot in outlined.slots}
    largest = costs.work_of(outlined, asked).largest
    found = probe.of_storing(outlined.source, asked, largest, outlined.format, grids, outlined.kept)
    of_block = [slot.out_features * slot.in_features for slot in outlined.slots if slot.block == 1]
    least = 2 * 0.02 * len(of_block) / sum(of_block)
    assert least < found < 3 * least


@pytest.mark.parametrize("waited", [[0.9], [0.9, 0.6]])
def test_one_slow_moment_is_not_every_windows(
    waited: list[float],
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the first fit loads and compiles its kernels; others may be held up."""
    waits = iter(waited)

    def slow_first(*given: Any, **more: Any) -> Any:
        time.sleep(next(waits, 0.0))
        return true_fit(*given, **more)

    true_fit = probe.fit
    monkeypatch.setattr(probe, "fit", slow_first)
    asked, source = recipe(text, device="cpu", compute_dtype="float32"), open_source(folder)
    step = plan_steps(asked, 2, "plan")[0]
    found = probe.of_window(source, asked, step, lambda slot: False, 4)
    assert 0 < found.step < 0.3
    assert found.opening < 0.5
    assert found.first > 0.3


def test_what_the_first_window_loads_is_not_every_windows(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels of the starts may take seconds, which a window alone does not show."""
    waits = iter([1.5])

    def slow_first(*given: Any) -> Any:
        time.sleep(next(waits, 0.0))
        return true_window(*given)

    true_window = probe.Window
    monkeypatch.setattr(probe, "Window", slow_first)
    asked, source = recipe(text, device="cpu", compute_dtype="float32"), open_source(folder)
    found = probe.of_window(source, asked, plan_steps(asked, 2, "plan")[0], lambda slot: False, 4)
    assert found.opening < 0.5
    assert found.first > 1.0


def test_made_up_weights_have_the_shapes_and_are_the_same_each_time(folder: Path) -> None:  # noqa: F811
    source = open_source(folder)
    made, shallow = MadeUp(source), MadeUp(source, 1)
    for name in source.names():
        assert made.read(name).shape == source.shape(name) == made.shape(name)
        assert torch.equal(made.read(name), made.read(name))
        assert not torch.equal(made.read(name), source.read(name)) or len(source.shape(name)) == 1
    assert shallow.config.num_hidden_layers == 1
    assert source.config.num_hidden_layers == 2


def test_layers_that_gpus_cannot_share(tmp_path: Path) -> None:
    model = save(random_model(llama_config(**WIDE)), tmp_path / "wide")  # 4 heads, 2 of keys
    planned = logitwise.plan(model, logitwise.Recipe.load(None, **RTN, group_size=128))
    assert planned.splits[1] is None
    assert planned.splits[2] is None
    assert (
        planned.splits[4] == "model.layers.0.self_attn.o_proj would have 64 inputs on each of 4, no whole groups of 128"
    )
    assert planned.splits[8] == "4 attention heads with 2 for keys cannot be shared by 8"
    assert logitwise.plan(model, logitwise.Recipe.load(None, **RTN, group_size=64)).splits[4] is None


def test_what_does_not_fit_is_refused_with_what_would_help(
    folder: Path,  # noqa: F811
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little = type("Memory", (), {"total": 2**20, "available": 2**20})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    found = CliRunner().invoke(
        app,
        [
            "plan",
            str(folder),
            "--calibration",
            f"text:{text}",
            *["--group-size", "16", "--rows", "8", "--row-tokens", "32"],
        ],
    )
    assert "time in all" in found.stdout
    assert isinstance(found.exception, RecipeError)
    assert found.exception.exit_code == 2
    assert "GiB of RAM are needed for " in found.exception.why
    assert found.exception.why.endswith(", there are 0.0")
    less = "fewer --rows, shorter --row-tokens, or a smaller --batch"
    assert found.exception.remedy == f"{less}; and a machine with more memory"


PLAIN = logitwise.Recipe.load(None)


@pytest.fixture
def two_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine, and a GPU, with so much memory."""
    monkeypatch.setattr(planning, "total_memory", lambda: 2 * 2**30)
    monkeypatch.setattr(planning, "free_memory", lambda device: 2 * 2**30)


@pytest.mark.parametrize(
    ("over", "device", "remedy"),
    [
        ({TEXT}, "cpu", other_text(PLAIN)),
        ({FITS}, "cpu", smaller_fit(PLAIN)),
        ({PROOF, STORING}, "cpu", more_memory(False)),
        ({TEXT}, "cuda", other_text(PLAIN)),
        ({FITS}, "cuda", smaller_fit(PLAIN)),
        ({PROOF}, "cuda", more_memory(True)),
        ({TEXT, PROOF}, "cuda", f"{other_text(PLAIN)}; and {more_memory(True)}"),
    ],
)
def test_what_would_help_is_for_the_part_that_does_not_fit(
    over: set[str],
    device: str,
    remedy: str,
    two_gib: None,
    tmp_path: Path,
) -> None:
    parts = {part: 3 * 2**30 if part in over else 2**30 for part in (TEXT, FITS, PROOF, STORING)}
    on_gpu = device == "cuda"
    memory = Memory(parts, {STORING: 1}, 0) if on_gpu else Memory(None, parts, 0)
    ((why, helps),) = planning._unmet(PLAIN, device, 0, memory, tmp_path)
    assert helps == remedy
    assert why.startswith(f"3.0 GiB of {'the GPU' if on_gpu else 'RAM'} are needed for ")
    assert why.endswith(", 2.0 are free" if on_gpu else ", there are 2.0")


def test_where_streams_do_not_fit_beside_a_gpu_fewer_rows_help(two_gib: None, tmp_path: Path) -> None:
    memory = Memory({FITS: 1}, {FITS: 3 * 2**30, STORING: 1}, 0)
    unmet = planning._unmet(PLAIN, "cuda", 0, memory, tmp_path)
    assert unmet == [("3.0 GiB of RAM are needed for fitting blocks, there are 2.0", smaller_fit(PLAIN))]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_no_rows_are_read_fewer_do_not_help(
    folder: Path,  # noqa: F811
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "total_memory", lambda: 2 << 40)
    monkeypatch.setattr(planning, "free_memory", lambda device: 2 << 40)
    asked = PLAIN.but(**RTN, device="cpu", compute_dtype="float32", group_size=16)
    outlined = outline(folder, asked, False, None)
    work = costs.work_of(outlined, asked.but(device=device, streams="cpu"))
    units = costs.Units(OfReading(0.0, 0.0, peak=5), 0.0, None, 0.0, replace(SMALL, peak=3 << 40), None)
    memory = costs.memory_of(outlined, work, units, 0)
    ((why, remedy),) = planning._unmet(asked, device, 0, memory, tmp_path)
    assert f"needed for {ROUNDING}" in why
    assert remedy == more_memory(device == "cuda"), "no rows are read"


@pytest.mark.parametrize(("part", "remedy"), [("of_text", other_text(PLAIN)), ("of_window", smaller_fit(PLAIN))])
def test_steps_that_do_not_fit_are_refused(
    part: str,
    remedy: str,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(costs, part, full)
    with pytest.raises(RecipeError, match="the GPU's memory is not enough") as caught:
        logitwise.plan(folder, recipe(None, calibration="self", device="cpu", compute_dtype="float32"))
    assert caught.value.why == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert caught.value.remedy == remedy


def test_a_dry_run_is_a_plan(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["--method", "rtn", "--objective", "mse", "--group-size", "16", "--bits", "3"]
    dry = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "out"), *options, "--dry-run"])
    planned = CliRunner().invoke(app, ["plan", str(folder), *options])
    assert dry.exit_code == planned.exit_code == 0
    for output in (dry.stdout, planned.stdout):
        assert "4.19 bits a weight" in output
        assert "rounding blocks" in output
    assert list(tmp_path.iterdir()) == []
    assert isinstance(logitwise.plan(folder, recipe(tmp_path, **RTN)), Plan)
