"""One run, end to end, on a tiny Llama: the checkpoint is the model that was measured."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitwise
from logitwise import calibrate, pipeline, probe, stream, unfinished
from logitwise.calibration import generate
from logitwise.calibration.rows import Rows
from logitwise.errors import (
    CalibrationError,
    FormatError,
    InputError,
    MachineError,
    OutputError,
    RecipeError,
    SourceError,
)
from logitwise.evaluation import evaluate, measure_models
from logitwise.fit import Data, fit
from logitwise.objectives.lfq import LogitAware
from logitwise.polish import Polish
from logitwise.quantizers import INFORMED
from logitwise.runfolder import RunFolder, run_folder_of
from logitwise.skeleton import Skeleton
from logitwise.source import open_source
from logitwise.stream import Walk
from logitwise.watch import SILENT, Watcher
from logitwise.windows import plan_steps

CPU = torch.device("cpu")
TINY = {
    "bits": 2,
    "group_size": 16,
    "rows": 24,
    "held_out": 8,
    "row_tokens": 24,
    "steps": 6,
    "batch": 4,
    "checks": 2,
    "scale_dtype": "float32",
}


class Listener(Watcher):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def prose(words: int, seed: int = 0) -> str:
    """Text with some regularity, in paragraphs."""
    rng = random.Random(seed)
    nouns, verbs = ["the hen", "the man", "a net", "the ant"], ["met", "ate", "hid", "saw"]
    lines = [f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}." for _ in range(words // 5)]
    return "\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two blocks whose weights are large enough to make its answers sure."""
    model = random_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return save(model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose(700), encoding="utf-8")
    return path


def recipe(text: Path, **changes: object) -> logitwise.Recipe:
    return logitwise.Recipe.load(None, **{**TINY, "calibration": f"text:{text}", **changes})


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids).logits


def dense_logits(original: Path, quantized: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the original model with the weights that our own reader finds in the checkpoint."""
    model, source = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32), open_source(quantized)
    model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_second_run_with_the_same_out_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    of_another = RunFolder(tmp_path / "out.run")
    with of_another.alone():
        of_another.note("first_row.txt", "its own")
        with pytest.raises(OutputError, match=r"another run is at work in .*out.run\n.*\n.*another place"):
            logitwise.quantize(folder, out, recipe(text, method="rtn", objective="mse"), fresh=True)
        assert (of_another.path / "first_row.txt").read_text() == "its own"
        assert not out.exists()
    logitwise.quantize(folder, out, recipe(text, method="rtn", objective="mse"))
    assert not of_another.path.exists()


def test_nothing_is_removed_from_a_run_folder_that_is_not_of_a_run(folder: Path, text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    for name in ("thesis.tex", "deep/notes.json", "weights.safetensors"):
        (mine / name).write_text(name)
    for fresh in (False, True):
        asked = recipe(text, method="rtn", objective="mse")
        logitwise.quantize(folder, tmp_path / f"out {fresh}", asked, fresh=fresh, run_folder=mine)
        assert sorted(str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file()) == [
            "deep/notes.json",
            "thesis.tex",
            "weights.safetensors",
        ]


def test_a_run_folder_is_the_same_by_whichever_link_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run_folder_of(tmp_path / "link") == run_folder_of(tmp_path / "real") == tmp_path / "real.run"


def test_a_mended_tokenizer_begins_the_run_anew(folder: Path, text: Path, tmp_path: Path) -> None:
    model, run, heard, again = tmp_path / "model", tmp_path / "run", Listener(), Listener()
    shutil.copytree(folder, model)
    logitwise.quantize(model, tmp_path / "one", recipe(text), keep_run=True, run_folder=run)
    logitwise.quantize(model, tmp_path / "again", recipe(text), keep_run=True, run_folder=run, watcher=again)
    assert any("finished before" in sentence for sentence in again.said)
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    logitwise.quantize(model, tmp_path / "two", recipe(text), run_folder=run, watcher=heard)
    assert not any("finished before" in sentence for sentence in heard.said)


def test_a_run_that_is_refused_late_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the hen", encoding="utf-8")
    with pytest.raises(CalibrationError):
        logitwise.quantize(folder, tmp_path / "out", recipe(tmp_path / "short.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("method", ["rtn", "flexround", "signround"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_transformers_loads_the_model_that_was_made(
    folder: Path, text: Path, tmp_path: Path, method: str, symmetric: bool
) -> None:
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    out = tmp_path / "out"
    result = logitwise.quantize(folder, out, recipe(text, method=method, symmetric=symmetric))
    assert torch.equal(logits_of(out, ids), dense_logits(folder, out, ids))
    assert not torch.allclose(logits_of(out, ids), logits_of(folder, ids), atol=1e-2)
    assert AutoTokenizer.from_pretrained(out)("the hen")["input_ids"] == tokenizer()("the hen")["input_ids"]
    assert result.report["bits_per_weight"] == pytest.approx(2 + 32 / 16 + (0 if symmetric else 2 / 16))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [16, None])
def test_float16_scales_are_what_was_measured(
    folder: Path, text: Path, tmp_path: Path, bits: int, group_size: int | None
) -> None:
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    changes = {"bits": bits, "group_size": group_size, "scale_dtype": "float16", "method": "rtn"}
    logitwise.quantize(folder, tmp_path / "out", recipe(text, **changes))
    assert (logits_of(tmp_path / "out", ids) - dense_logits(folder, tmp_path / "out", ids)).abs().max() < 1e-2


def test_lfq_lowers_the_divergence_on_text_it_did_not_see(folder: Path, text: Path, tmp_path: Path) -> None:
    """The whole point, at toy size: RTN > MSE > LFQ on held-out rows that chose nothing."""
    source, unseen = open_source(folder), tmp_path / "unseen.txt"
    unseen.write_text(prose(400, seed=9), encoding="utf-8")
    from logitwise.calibration.rows import pack
    from logitwise.calibration.text import read_text

    rows = pack(read_text(unseen, source.tokenizer()), 0, 24)[:40]
    run = {"run_folder": tmp_path / "run", "keep_run": True}
    strong = recipe(text, rows=60, steps=60, batch=8, checks=4)
    results = [
        logitwise.quantize(folder, tmp_path / "rtn", strong.but(method="rtn")),
        logitwise.quantize(folder, tmp_path / "lfq", strong, **run),
        logitwise.quantize(folder, tmp_path / "mse", strong.but(objective="mse"), **run),
    ]
    sources = [open_source(tmp_path / name) for name in ("rtn", "mse", "lfq")]
    rtn, mse, lfq = (found.kl.mean for found in measure_models(sources, source, rows, "cpu"))
    assert lfq < mse < rtn
    assert results[1].fitted_by == "lfq"
    assert results[1].held_out_kl["lfq"] < results[1].held_out_kl["mse"]
    assert results[2].held_out_kl == {"mse": results[1].held_out_kl["mse"]}


def test_only_the_final_blocks_differ_between_objectives(folder: Path, text: Path, tmp_path: Path) -> None:
    run = {"run_folder": tmp_path / "run", "keep_run": True}
    logitwise.quantize(folder, tmp_path / "lfq", recipe(text), **run)
    logitwise.quantize(folder, tmp_path / "mse", recipe(text, objective="mse"), **run)
    one, other = open_source(tmp_path / "lfq"), open_source(tmp_path / "mse")
    different = {name for name in one.names() if not torch.equal(one.read(name), other.read(name))}
    assert different
    assert all(name.startswith("model.layers.1.") for name in different)


def test_two_final_blocks_are_fitted_together(folder: Path, text: Path, tmp_path: Path) -> None:
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, final_blocks=2, steps=20), keep_run=True)
    assert [(w["blocks"], w["objective"]) for w in result.report["windows"]] == [
        ([0, 0], "mse"),
        ([1, 1], "mse"),
        ([0, 1], "lfq"),
    ]
    assert result.fitted_by == "lfq"


def test_final_windows_shrink_and_each_keeps_its_first_block(folder: Path, text: Path, tmp_path: Path) -> None:
    changes = {"final_blocks": 2, "shrink": True, "steps": 20}
    run = {"run_folder": tmp_path / "run", "keep_run": True}
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, **changes), **run)
    windows = {(tuple(w["blocks"]), w["objective"]): w for w in result.report["windows"]}
    assert list(windows) == [((0, 0), "mse"), ((1, 1), "mse"), ((0, 1), "lfq"), ((1, 1), "lfq")]
    both, last = windows[(0, 1), "lfq"], windows[(1, 1), "lfq"]
    # Each starts where the one before it ended: at the MSE fit of both blocks, then at their fit together.
    assert both["held_out"][0][1] == pytest.approx(windows[(1, 1), "mse"]["held_out_kl"], rel=1e-5)
    assert last["held_out"][0][1] == pytest.approx(both["held_out_kl"], rel=1e-5)
    assert result.held_out_kl == {"mse": windows[(1, 1), "mse"]["held_out_kl"], "lfq": last["held_out_kl"]}
    one = logitwise.quantize(folder, tmp_path / "one", recipe(text, **{**changes, "shrink": False}), **run)
    whole, shrunk = open_source(tmp_path / "one"), open_source(tmp_path / "out")
    different = {name for name in whole.names() if not torch.equal(whole.read(name), shrunk.read(name))}
    assert one.held_out_kl["lfq"] > result.held_out_kl["lfq"]
    assert different
    assert all(name.startswith("model.layers.1.") for name in different)


@pytest.mark.parametrize(
    "changes",
    [
        {"start_last": "start"},
        {"teacher_last": "quantized"},
        {"learning_last": {"scale": {"optimizer": "adam", "rate": 1e-4, "schedule": "linear"}}},
        {"objective_settings": {"temperature": 2.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_option_of_the_final_blocks_changes_them_alone(
    folder: Path, text: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    logitwise.quantize(folder, tmp_path / "plain", recipe(text))
    logitwise.quantize(folder, tmp_path / "other", recipe(text, **changes))
    one, other = open_source(tmp_path / "plain"), open_source(tmp_path / "other")
    different = {name for name in one.names() if not torch.equal(one.read(name), other.read(name))}
    assert different
    assert all(name.startswith("model.layers.1.") for name in different)


@pytest.mark.parametrize("method", ["rtn", "flexround"])
def test_a_polished_checkpoint_is_what_was_measured_and_lowers_the_divergence(
    folder: Path, text: Path, tmp_path: Path, method: str
) -> None:
    changes = {"method": method, "scale_dtype": "float16"}
    polish = {**changes, "polish": True, "polish_steps": 30, "polish_rows": 30}
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    run = {"run_folder": tmp_path / "run", "keep_run": True}
    plain = logitwise.quantize(folder, tmp_path / "plain", recipe(text, **changes), **run)
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, **polish), **run)
    measures = dict(result.report["polish"]["held_out"])
    assert result.held_out_kl["polish"] == measures[result.report["polish"]["kept"]] < measures[0]
    if method != "rtn":
        assert measures[0] == pytest.approx(plain.held_out_kl[plain.fitted_by], rel=1e-3)
    assert (logits_of(tmp_path / "out", ids) - dense_logits(folder, tmp_path / "out", ids)).abs().max() < 1e-2
    one, other = open_source(tmp_path / "plain"), open_source(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.quantized(name).codes, other.quantized(name).codes)
    assert torch.equal(one.quantized(name).zero, other.quantized(name).zero)
    assert not torch.equal(one.quantized(name).scale, other.quantized(name).scale)
    assert not torch.equal(one.read("model.norm.weight"), other.read("model.norm.weight"))
    again = logitwise.quantize(folder, tmp_path / "again", recipe(text, **polish), **run)
    assert again.report["polish"] == result.report["polish"]
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_polish_on_fresh_text_of_the_model_says_how_much_it_read(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    changes = {"calibration": "self", "rows": 6, "held_out": 4, "row_tokens": 48, "batch": 2, "steps": 2}
    changes |= {"polish": True, "polish_fresh": True, "polish_steps": 10, "checks": 5}
    made = logitwise.Recipe.load(None, **{**TINY, **changes})
    result = logitwise.quantize(folder, tmp_path / "out", made, watcher=listener)
    steps = len(result.report["polish"]["losses"])
    assert result.report["polish"]["tokens"] > result.report["calibration"]["counted_tokens"]
    assert any(f"{result.report['polish']['tokens']:,} tokens were learned from" in said for said in listener.said)
    assert steps <= 10
    again = logitwise.quantize(folder, tmp_path / "again", made)
    assert again.report["polish"] == result.report["polish"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Rows]]:
    """The parts of fresh text that a run has taken, each with how many it left out."""
    taken: list[tuple[int, Rows]] = []

    def noting(*given: object, after: int = 0, **more: object) -> Iterator[Rows]:
        for rows in true_fresh_rows(*given, after=after, **more):
            taken.append((after, rows))
            yield rows

    true_fresh_rows = pipeline.fresh_rows
    monkeypatch.setattr(pipeline, "fresh_rows", noting)
    return taken


def test_blocks_and_polish_read_other_fresh_text_and_the_way_it_is_written_is_in_their_keys(
    folder: Path, tmp_path: Path, parts: list[tuple[int, Rows]]
) -> None:
    settings = {"rows": 6, "held_out": 4, "row_tokens": 24, "batch": 2, "steps": 6, "checks": 3}
    settings |= {"fresh_last": True, "choose_last": "last", "polish": True, "polish_fresh": True, "polish_steps": 6}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(open_source(folder).config.vocab_size, (10, 25), generator=generator)
    given = Rows(ids[:, :-1], ids[:, 1:], torch.ones(10, 24))
    run = {"run_folder": tmp_path / "run", "keep_run": True, "rows": given}
    made = logitwise.Recipe.load(None, **{**TINY, **settings})
    first = logitwise.quantize(folder, tmp_path / "out", made, **run)
    places = {after for after, _ in parts}
    assert places == {0, pipeline.PARTS_OF_THE_BLOCKS}
    blocks, polish = ([rows for after, rows in parts if after == place] for place in sorted(places))
    assert not torch.equal(blocks[0].ids, polish[0].ids)
    parts.clear()
    logitwise.quantize(folder, tmp_path / "again", made, **run)
    assert not parts
    other = logitwise.quantize(folder, tmp_path / "other", made.but(temperature=0.1), **run)
    assert {after for after, _ in parts} == places
    assert other.report["windows"][-1]["losses"] != first.report["windows"][-1]["losses"]
    assert other.report["polish"]["losses"] != first.report["polish"]["losses"]


def test_the_iterate_of_the_least_batch_may_be_kept(folder: Path, text: Path, tmp_path: Path) -> None:
    changes = {"steps_last": 20, "choose_last": "batch", "objective": "hard_labels"}
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, **changes))
    final = result.report["windows"][-1]
    assert final["kept"] == final["losses"].index(min(final["losses"]))
    assert result.fitted_by == "hard_labels"


def test_a_block_may_stay_in_full_precision(folder: Path, text: Path, tmp_path: Path) -> None:
    for name, blocks in (("one", 1), ("all", "all")):
        made = recipe(text, keep=("*layers.0.*",), final_blocks=blocks)
        result = logitwise.quantize(folder, tmp_path / name, made)
        assert len(result.report["windows"]) == 3
        assert "model.layers.0.mlp.up_proj.weight" in open_source(tmp_path / name).names()


def test_where_fresh_text_comes_from_is_checked_before_the_work_also_for_given_rows(
    folder: Path, tmp_path: Path
) -> None:
    ids = torch.zeros(24, 25, dtype=torch.int64)
    given = Rows(ids[:, :-1], ids[:, 1:], torch.ones(24, 24))
    made = logitwise.Recipe.load(None, **{**TINY, "calibration": "self:/nowhere.txt", "fresh_last": True})
    with pytest.raises(CalibrationError, match=r"nowhere\.txt"):
        logitwise.quantize(folder, tmp_path / "out", made, rows=given)
    assert not (tmp_path / "out.run").exists()


def test_final_blocks_on_fresh_text_of_the_model_say_how_much_they_read(
    folder: Path, tmp_path: Path, parts: list[tuple[int, Rows]]
) -> None:
    listener = Listener()
    changes = {"calibration": "self", "rows": 6, "held_out": 4, "row_tokens": 48, "batch": 2, "steps": 10, "checks": 5}
    made = logitwise.Recipe.load(None, **{**TINY, **changes, "fresh_last": True, "choose_last": "last"})
    result = logitwise.quantize(folder, tmp_path / "out", made, watcher=listener)
    final = result.report["windows"][-1]
    assert final["objective"] == "lfq"
    assert [after for after, _ in parts] == [0] * len(parts)
    first = result.report["calibration"]["counted_tokens"]
    assert first < final["tokens"] <= first + sum(rows.counted() for _, rows in parts)
    assert any(f"{final['tokens']:,} tokens were learned from" in said for said in listener.said)
    again = logitwise.quantize(folder, tmp_path / "again", made)
    assert again.report["windows"][-1]["losses"] == final["losses"]
    other = logitwise.quantize(folder, tmp_path / "other", made.but(fresh_last=False))
    assert len(other.report["windows"][-1]["losses"]) == 10
    assert other.report["windows"][-1]["flat"] is None


def test_fresh_rows_arrive_as_the_rows_there_are(folder: Path, text: Path, tmp_path: Path) -> None:
    """The hidden states of fresh rows, found block by block, are those that the walk had of the same rows."""
    source = open_source(folder)
    skeleton = Skeleton(source, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(skeleton.model.config.vocab_size, (8, 17), generator=generator)
    rows = Rows(ids[:, :-1], ids[:, 1:], torch.ones(8, 16))
    made = recipe(text, final_blocks=1, rows=6, held_out=2)
    steps = plan_steps(made, len(skeleton), "root")
    seen: list[Data] = []
    walk = Walk(skeleton, made, rows, 2, RunFolder(tmp_path / "run"), lambda slot: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "fit", lambda *given, **more: seen.append(given[4]) or fit(*given, **more))
        walk.run(steps, SILENT)
    with torch.no_grad():
        found = walk._arriving(rows, steps[: len(skeleton) - 1], skeleton.calls(16))
    assert torch.equal(found.inputs, seen[-1].inputs)
    assert torch.equal(found.targets, seen[-1].targets)
    assert (found.train, found.held_out) == (8, 0)


def test_all_blocks_may_be_final(folder: Path, text: Path, tmp_path: Path) -> None:
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, final_blocks="all"))
    assert [window["blocks"] for window in result.report["windows"]] == [[0, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"start_last": "start"}, [6, 9, 9, 9]), ({}, [6, 6, 6, 9]), ({"objective": "mse"}, [6, 9, 9])],
)
def test_an_mse_fit_is_as_long_as_what_it_is_held_against_and_short_where_it_is_a_start(
    changes: dict[str, str], expected: list[int]
) -> None:
    made = logitwise.Recipe.load(None, **{"steps": 6, "steps_last": 9, "final_blocks": 2, **changes})
    assert [step.steps for step in plan_steps(made, 3, "root")] == expected


def test_more_rows_for_the_final_block_leave_the_blocks_before_as_they_are(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    listener = Listener()
    place = {"run_folder": tmp_path / "run", "keep_run": True}
    few = recipe(text, rows=8, rows_last=16)
    logitwise.quantize(folder, tmp_path / "few", few, **place)
    logitwise.quantize(folder, tmp_path / "more", few.but(rows_last=12), watcher=listener, **place)
    assert "2 of 3 fits were finished before" in listener.said


@pytest.mark.parametrize("start", INFORMED)
def test_a_start_that_knows_its_inputs_makes_round_to_nearest_better(
    start: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    kl = {}
    for each in ("minmax", start):
        made = recipe(text, method="rtn", start=each)
        result = logitwise.quantize(folder, tmp_path / each, made)
        found = evaluate(tmp_path / each, text=f"text:{text}", reference=folder, row_tokens=32)
        kl[each] = found.likelihood.kl.mean
    assert result.fitted_by == "mse"
    assert [window["blocks"] for window in result.report["windows"]] == [[0, 0], [1, 1]]
    assert kl[start] < kl["minmax"]


@pytest.mark.parametrize("start", ["searched", "gptq"])
def test_final_blocks_that_start_at_their_own_fit_start_exactly_there(
    start: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    made = recipe(text, start=start, final_blocks=2, steps_last=0)
    result = logitwise.quantize(folder, tmp_path / "out", made.but(choose_last="last"))
    assert result.held_out_kl["lfq"] == pytest.approx(result.held_out_kl["mse"], rel=1e-5)
    plain = logitwise.quantize(folder, tmp_path / "mse", recipe(text, start=start, objective="mse"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "mse/model.safetensors").read_bytes()
    assert plain.fitted_by == "mse"


def test_a_polish_that_gains_nothing_leaves_the_scales_and_says_so(folder: Path, text: Path, tmp_path: Path) -> None:
    listener = Listener()
    wild = {role: {"optimizer": "adam", "rate": 3.0, "schedule": "cosine"} for role in ("scale", "vector")}
    changes = {"polish": True, "polish_steps": 4, "polish_learning": wild}
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, **changes), watcher=listener)
    logitwise.quantize(folder, tmp_path / "plain", recipe(text))
    assert "the polish lowered KL on the held-out rows at no step" in result.unmet[0]
    assert result.unmet[0] in listener.said
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


def test_the_mse_fit_is_kept_where_lfq_is_no_better(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    from logitwise import stream

    true_fit = stream.fit

    def spoiled(window, quantizers, objective, *rest, **more):  # type: ignore[no-untyped-def]
        if objective.reads_head:
            for quantizer in quantizers.values():
                with torch.no_grad():
                    quantizer.log_scale.add_(1.0)
        return true_fit(window, quantizers, objective, *rest, **more)

    monkeypatch.setattr(stream, "fit", spoiled)
    changes = {"steps": 8, "steps_last": 0, "checks": 1}
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, **changes), watcher=listener)
    assert result.fitted_by == "mse"
    assert result.held_out_kl["lfq"] >= result.held_out_kl["mse"]
    assert len(result.unmet) == 1
    assert "the MSE fit was kept" in result.unmet[0]
    assert result.unmet[0] in listener.said


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_random_state(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in ("one", "two"):
        logitwise.quantize(folder, tmp_path / name, recipe(text))
    logitwise.quantize(folder, tmp_path / "other", recipe(text, seed=1))
    one, two, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "other"))
    assert one == two
    assert one != other
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_a_run_that_stopped_goes_on_and_gives_the_same_bytes(folder: Path, text: Path, tmp_path: Path) -> None:
    from logitwise import stream

    logitwise.quantize(folder, tmp_path / "whole", recipe(text))
    true_fit, calls = stream.fit, []

    def stopping(*arguments, **more):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_fit(*arguments, **more)

    stream.fit = stopping
    try:
        with pytest.raises(KeyboardInterrupt):
            logitwise.quantize(folder, tmp_path / "out", recipe(text))
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.run").exists()
        calls.clear()
        calls.append(1), calls.append(1)
        listener = Listener()
        logitwise.quantize(folder, tmp_path / "out", recipe(text), watcher=listener)
    finally:
        stream.fit = true_fit
    assert len(calls) == 4  # two of three windows were left
    assert "1 of 3 fits were finished before" in listener.said
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_polish_that_stopped_goes_on_and_gives_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh: bool,
) -> None:
    """Of 12 steps 10 are done, and how far it was is kept after 9."""
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    changes = {"calibration": "self", "rows": 12, "held_out": 4, "row_tokens": 48, "checks": 4, "temperature": 1.5}
    asked = logitwise.Recipe.load(
        None, **{**TINY, **changes, "polish": True, "polish_steps": 12, "polish_fresh": fresh}
    )
    whole = logitwise.quantize(folder, tmp_path / "whole", asked)
    true_learn, calls = Polish._learn, []

    def stopping(*given):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return true_learn(*given)

    monkeypatch.setattr(Polish, "_learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        logitwise.quantize(folder, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()
    calls[:] = [1] * 11
    resumed = logitwise.quantize(folder, tmp_path / "out", asked)
    assert len(calls) - 11 == len(whole.report["polish"]["losses"]) - 9
    assert resumed.report["polish"] == whole.report["polish"]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other
    assert not (tmp_path / "out.run").exists()


def test_a_fit_of_the_final_blocks_that_stopped_goes_on_and_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in its last step; of the steps before the last check, and of the fresh text, none is made again."""
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    changes = {"calibration": "self", "rows": 12, "held_out": 4, "row_tokens": 48, "checks": 4, "temperature": 1.5}
    asked = logitwise.Recipe.load(None, **{**TINY, **changes, "steps": 1, "steps_last": 12, "fresh_last": True})
    true_loss, steps = LogitAware.loss, []
    true_answer, batches = generate.answer, []

    def stopping(*given):  # type: ignore[no-untyped-def]
        steps.append(1)
        if len(steps) == last:
            raise KeyboardInterrupt
        return true_loss(*given)

    def counting(*given):  # type: ignore[no-untyped-def]
        batches.append(1)
        return true_answer(*given)

    monkeypatch.setattr(generate, "answer", counting)
    whole = logitwise.quantize(folder, tmp_path / "whole", asked)
    last, in_one_go = len(whole.report["windows"][-1]["losses"]), len(batches)
    monkeypatch.setattr(LogitAware, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        logitwise.quantize(folder, tmp_path / "out", asked)
    steps.clear()
    kept, last = max(check for check in (3, 6, 9) if check < last), 0
    resumed = logitwise.quantize(folder, tmp_path / "out", asked)
    assert len(steps) == len(whole.report["windows"][-1]["losses"]) - kept
    assert len(batches) == 2 * in_one_go
    for name in ("losses", "held_out", "kept", "tokens", "flat"):
        assert resumed.report["windows"][-1][name] == whole.report["windows"][-1][name]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other


def test_the_models_own_text_and_the_first_row_are_kept(folder: Path, tmp_path: Path) -> None:
    changes = {"calibration": "self", "rows": 6, "held_out": 4, "row_tokens": 64, "batch": 2}
    made = logitwise.Recipe.load(None, **{**TINY, **changes})
    result = logitwise.quantize(folder, tmp_path / "out", made, keep_run=True)
    first = (tmp_path / "out.run" / "first_row.txt").read_text("utf-8")
    assert first
    assert result.report["calibration"]["first"] == first
    assert result.report["calibration"]["rows"] == 6


def test_the_report_says_everything(folder: Path, text: Path, tmp_path: Path) -> None:
    logitwise.quantize(folder, tmp_path / "out", recipe(text, keep=("down_proj",)))
    report = json.loads((tmp_path / "out" / "logitwise.json").read_text("utf-8"))
    assert {entry["tensor"] for entry in report["audit"]} == set(open_source(folder).names())
    kept = {entry["tensor"]: entry["why"] for entry in report["audit"] if entry["fate"] == "kept"}
    assert kept["model.layers.0.mlp.down_proj.weight"] == "--keep"
    assert all(choice["why"] for choice in report["choices"].values())
    assert len(report["model"]["sha256"]) == 64
    assert report["recipe"]["bits"] == 2
    assert len(report["windows"][0]["losses"]) == 6
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_of(tmp_path / "out", ids), dense_logits(folder, tmp_path / "out", ids))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "logitwise" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_rows_given_in_python_are_used(folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (12, 17), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids[:, :-1], ids[:, 1:], torch.ones(12, 16))
    made = logitwise.Recipe.load(None, **{**TINY, "held_out": 4, "checks": 1})
    result = logitwise.quantize(folder, tmp_path / "out", made, rows=rows)
    assert result.report["calibration"] == {"rows": 8, "held_out_rows": 4, "counted_tokens": 128}


def test_rows_given_in_python_that_cannot_teach_or_choose_are_refused(folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (12, 17), generator=torch.Generator().manual_seed(0))
    unheld = torch.ones(12, 16)
    unheld[8:] = 0
    made, out = logitwise.Recipe.load(None, **{**TINY, "held_out": 4}), tmp_path / "out"
    few = Rows(ids[:3, :-1], ids[:3, 1:], torch.ones(3, 16))
    refused(CalibrationError, "3 rows cannot be learned from", folder, out, made, out=out, rows=few)
    refused(CalibrationError, "12 rows cannot", folder, out, made, out=out, rows=Rows(ids[:, :-1], ids[:, 1:], unheld))


def test_a_tensor_that_the_model_has_no_place_for_is_said_and_in_the_audit(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    copy, listener = tmp_path / "copy", Listener()
    shutil.copytree(folder, copy)
    stored = load_file(copy / "model.safetensors")
    save_file({**stored, "model.old.table": torch.ones(3)}, copy / "model.safetensors", {"format": "pt"})
    result = logitwise.quantize(copy, tmp_path / "out", recipe(text, method="rtn"), watcher=listener)
    fates = {entry["tensor"]: entry["fate"] for entry in result.report["audit"]}
    assert fates["model.old.table"] == "dropped"
    assert any("model.old.table" in sentence for sentence in listener.said)
    assert "model.old.table" not in open_source(tmp_path / "out").names()


def test_figures_of_two_models_that_are_not_a_pair_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    other = save(random_model(llama_config()), tmp_path / "other")
    with pytest.raises(SourceError, match="not a version of") as caught:
        evaluate(other, reference=folder, text=f"text:{text}", row_tokens=24)
    assert "another shape" in str(caught.value)


def test_without_held_out_rows_the_last_iterate_is_kept_and_that_is_said(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    listener = Listener()
    result = logitwise.quantize(folder, tmp_path / "out", recipe(text, held_out=0), watcher=listener)
    assert result.held_out_kl == {}
    assert result.fitted_by == "lfq"
    assert any("no rows were held out" in sentence for sentence in listener.said)


def refused(error: type[InputError], match: str, *arguments: object, out: Path, **more: object) -> None:
    with pytest.raises(error, match=match) as caught:
        logitwise.quantize(*arguments, **more)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    assert not out.exists()
    assert not out.with_name(out.name + ".run").exists()


def test_what_is_refused_before_any_work(folder: Path, text: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "out", recipe(text)
    refused(SourceError, "does not exist", tmp_path / "nothing", out, good, out=out)
    refused(FormatError, r"48 inputs.*groups of 24 do not|48 inputs", folder, out, good.but(group_size=20), out=out)
    refused(InputError, "method fleround", folder, out, good.but(method="fleround"), out=out)
    refused(InputError, "objective kl", folder, out, good.but(objective="kl"), out=out)
    refused(InputError, "format zip", folder, out, good.but(format="zip"), out=out)
    refused(InputError, "final_blocks 3", folder, out, good.but(final_blocks=3), out=out)
    meant = "--keep dwn_proj names no layer\n.*\n.*down_proj"
    refused(InputError, meant, folder, out, good.but(keep=("dwn_proj",)), out=out)
    refused(InputError, "nothing is left", folder, out, good.but(keep=("*proj",)), out=out)
    refused(InputError, "missing.txt", folder, out, good.but(calibration=f"text:{tmp_path}/missing.txt"), out=out)
    refused(InputError, "device", folder, out, good.but(device="nowhere"), out=out)
    typo = {"rouding": {"optimizer": "adam", "rate": 1e-3, "schedule": "cosine"}}
    refused(InputError, r"learning\.rouding.*", folder, out, good.but(learning=typo), out=out)
    refused(InputError, r"polish_learning\.rouding.*", folder, out, good.but(polish_learning=typo), out=out)
    refused(InputError, "polish_fresh is not read", folder, out, good.but(polish_fresh=True, polish=True), out=out)
    refused(
        InputError, "polish_fresh is not read", folder, out, good.but(polish_fresh=True, calibration="self"), out=out
    )
    refused(InputError, r"settings\.heat", folder, out, good.but(objective_settings={"heat": 2}), out=out)
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    refused(InputError, "too few", folder, out, good.but(calibration=f"text:{short}"), out=out)


def test_a_quantized_model_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    logitwise.quantize(folder, made, recipe(text, method="rtn"))
    refused(SourceError, "quantized already", made, tmp_path / "out", recipe(text), out=tmp_path / "out")


def test_weights_that_are_not_numbers_are_refused_by_name(text: Path, tmp_path: Path) -> None:
    model = random_model(llama_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    broken = save(model, tmp_path / "broken")
    out = tmp_path / "out"
    refused(SourceError, r"model\.layers\.1\.mlp\.up_proj\.weight", broken, out, recipe(text), out=out)


def test_transposed_weights_are_refused_by_name(text: Path, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    out = tmp_path / "out"
    refused(FormatError, r"transformer\.h\.0\..*transposed", tmp_path / "gpt2", out, recipe(text), out=out)


def test_the_last_fit_is_tried_first_and_changes_nothing(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logitwise.quantize(folder, tmp_path / "plain", recipe(text, final_blocks=2))
    monkeypatch.setattr(pipeline, "TRIED_ON", ("cpu",))
    logitwise.quantize(folder, tmp_path / "tried", recipe(text, final_blocks=2))
    plain, tried = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tried"))
    assert all(torch.equal(plain[name], tried[name]) for name in plain)

    for compiled in (False, True):
        asked = list[bool]()
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "compiles", lambda skeleton, steps, compiled=compiled: compiled)
            patched.setattr(pipeline, "try_memory", lambda *given, asked=asked: asked.append(given[-1]))
            logitwise.quantize(folder, tmp_path / f"compiled {compiled}", recipe(text))
        assert asked == [compiled]

    def starved(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(probe, "fit", starved)
    with pytest.raises(MachineError, match=r"the GPU's memory is not enough(.|\n)*9 GiB(.|\n)*smaller --batch"):
        logitwise.quantize(folder, tmp_path / "out", recipe(text))
    assert not [file for file in (tmp_path / "out.run").glob("*.json") if '"blocks"' in file.read_text()]


def test_where_the_whole_model_does_not_fit_text_is_to_be_given(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def large(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(calibrate, "load_whole", large)
    with pytest.raises(MachineError, match=r"the GPU's memory is not enough(.|\n)*--calibration text:FILE"):
        logitwise.quantize(folder, tmp_path / "out", logitwise.Recipe.load(None, **TINY, calibration="self"))


def test_where_the_proof_does_not_fit_it_is_refused(
    folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def starved(self: Skeleton) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(Skeleton, "proof_logits", starved)
    with pytest.raises(RecipeError, match=r"the memory is not enough(.|\n)*a machine with more memory"):
        logitwise.quantize(folder, tmp_path / "out", recipe(text))
    assert not list(tmp_path.glob("out*"))
