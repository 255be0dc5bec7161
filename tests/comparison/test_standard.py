"""lm_eval's tasks on tiny models: figures, pairs, what is kept, what is refused; on made-up documents."""

import contextlib
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from source_files import decided_model, llama_config, save
from standard_tasks import write_tasks

import logitwise
from logitwise import machine
from logitwise.comparison import compare, standard
from logitwise.errors import MachineError, RecipeError
from logitwise.measure.figure import bootstrap_interval
from logitwise.recipe import Recipe
from logitwise.report.markdown import summary_of
from logitwise.runfolder import RunFolder
from logitwise.watch import Watcher

SCHEMA = json.loads(files("logitwise.report").joinpath("compare.schema.json").read_text("utf-8"))


def test_that_it_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is read: the model is not there either."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"lm_eval 0.4.12 or later is not installed") as refused:
        compare(tmp_path / "none", [tmp_path / "none"], report=tmp_path / "r.html", lm_eval="wikitext")
    assert refused.value.exit_code == 2
    assert 'pip install "logitwise[lm-eval]"' in refused.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lm_eval": "wikitext", "lm_eval_limit": 0}, "lm_eval_limit is 0"),
        ({"lm_eval_limit": 3}, "no task of lm_eval was asked for"),
        ({"lm_eval": " , "}, "was asked for no task"),
    ],
)
def test_numbers_that_mean_nothing(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        compare(tmp_path / "none", [tmp_path / "none"], report=tmp_path / "r.html", **change)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same at 2 bits, and tasks."""
    pytest.importorskip("lm_eval.tasks.manager", reason="lm_eval is not installed")
    place = tmp_path_factory.mktemp("place")
    model = decided_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    save(model, place / "model")
    logitwise.quantize(place / "model", place / "w2", Recipe.load(None, method="rtn", bits=2, group_size=16))
    (place / "prompts.txt").write_text("the hen\nan ant\n", encoding="utf-8")
    write_tasks(place)
    return place


def compared(place: Path, tasks: str = "made_up", report: str = "report.html", **more: Any) -> dict[str, Any]:
    paths = ",".join(str(place / task) for task in tasks.split(","))
    given = {"prompts": place / "prompts.txt", "answer_tokens": 4, "device": "cpu", "lm_eval": paths, **more}
    return compare(place / "model", [place / "w2"], report=place / report, **given).findings


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:  # as for each test, which is later than this
        patched.setattr(machine, "multiplies_bfloat16", lambda: False)
        return compared(place)


def test_figures_are_those_of_lm_eval_itself(place: Path, found: dict[str, Any]) -> None:
    """By lm_eval's own entry, from the folder of the model; the quantized one's weights as they are stored."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskManager
    from source_files import tokenizer
    from transformers import AutoModelForCausalLM

    from logitwise.source import open_stored

    jsonschema.validate(found, SCHEMA)
    manager = TaskManager(include_path=str(place / "made_up"), include_defaults=False)
    per_document = []
    for findings, folder in zip(found["models"], ("model", "w2"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        stored = open_stored(place / folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.read(name))
        own = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer()),
            tasks=["made_up_group", "made_up_read"],
            task_manager=manager,
        )
        group, read = findings["lm_eval"]
        assert [group["task"], read["task"]] == ["made_up_group", "made_up_read"]
        for entry in (group, *group["parts"], read):
            for metric in entry["metrics"]:
                expected = own["results"][entry["task"]][f"{metric['metric']},{metric['filter']}"]
                assert metric["value"] == pytest.approx(expected, rel=1e-4), entry["task"]
        choice = group["parts"][0]
        assert choice["metrics"][0]["standard_error"] == pytest.approx(
            own["results"]["made_up_choice"]["acc_stderr,none"], rel=1e-4
        )
        assert (choice["documents"], group["documents"], read["documents"]) == (24, 30, 6)
        per_document.append([float(sample["acc"]) for sample in own["samples"]["made_up_choice"]])
    full, quantized = (torch.tensor(values, dtype=torch.float64) for values in per_document)
    assert full.tolist() != quantized.tolist(), "so that there is a difference to pair"
    (metric,) = found["models"][1]["lm_eval"][0]["parts"][0]["metrics"]
    assert metric["difference"] == pytest.approx(float((quantized - full).mean()), abs=1e-6)
    assert metric["interval"] == pytest.approx(bootstrap_interval(quantized - full, 0), abs=1e-5)
    (perplexity,) = found["models"][1]["lm_eval"][1]["metrics"]
    assert perplexity["interval"] is None and perplexity["difference"] and perplexity["higher_is_better"] is False
    assert found["models"][0]["lm_eval"][0]["parts"][0]["metrics"][0]["difference"] is None


def test_how_they_were_run_is_said(place: Path, found: dict[str, Any]) -> None:
    made = found["conditions"]["lm_eval"]
    assert (made["limit"], made["chat_template"]) == (None, False)
    assert made["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "few_shot": 1234}
    group, read = made["tasks"]
    assert group == {"task": "made_up_group", "from": "made_up", "version": "3.0", "few_shot": None, "documents": 30}
    assert (read["few_shot"], read["from"]) == (0, "made_up")
    limited = compared(place, "made_up/choice.yaml", "limited.html", lm_eval_limit=3)
    (task,) = limited["conditions"]["lm_eval"]["tasks"]
    assert (limited["conditions"]["lm_eval"]["limit"], task["from"], task["documents"]) == (3, "choice.yaml", 24)
    assert limited["models"][1]["lm_eval"][0]["documents"] == 3
    assert len(limited["sentences"]) == 5
    assert "By lm_eval's made_up_choice, " in limited["sentences"][1]


def test_finished_tasks_are_kept(place: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = standard._run, []

    def counted(task: Any, *given: Any) -> Any:
        done.append(task.task_name)
        if len(done) == 4:
            raise KeyboardInterrupt
        return run(task, *given)

    monkeypatch.setattr(standard, "_run", counted)
    assert {**compared(place), "made": found["made"]} == found
    assert not done, "all of it was there"
    with pytest.raises(KeyboardInterrupt):
        compared(place, report="broken.html")
    resumed = compared(place, report="broken.html")
    assert done == [*["made_up_choice", "made_up_written", "made_up_read"] * 2][:4] + done[4:]
    assert done[3:] == ["made_up_choice", "made_up_choice", "made_up_written", "made_up_read"]
    assert [model["lm_eval"] for model in resumed["models"]] == [model["lm_eval"] for model in found["models"]]
    scoring = place / "made_up" / "scoring.py"
    text = scoring.read_text("utf-8")
    scoring.write_text(text.replace("aeiou", "hmt"), encoding="utf-8")
    done.clear()
    monkeypatch.setattr(standard, "_run", lambda task, *given: done.append(task.task_name) or run(task, *given))
    compared(place)
    scoring.write_text(text, encoding="utf-8")
    assert done == ["made_up_written"] * 2, "what it is scored by has changed"


class Listening(Watcher):
    """Keeps the names of stages and what is said."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.said: list[str] = []

    @contextlib.contextmanager
    def stage(self, title: str, total: float) -> Any:
        self.stages.append(title)
        with super().stage(title, total) as stage:
            yield stage

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def test_nothing_leaks(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Into the terminal; what lm_eval warns of is said once."""
    (place / "long.jsonl").write_text(json.dumps({"prompt": "the hen " * 60, "answer": "hen."}) + "\n", "utf-8")
    task = (place / "made_up" / "read.yaml").read_text("utf-8").replace("loglikelihood_rolling", "loglikelihood")
    task = task.replace("made_up_read", "made_up_long").replace("written.jsonl", "long.jsonl")
    task = task.replace('doc_to_text: ""', 'doc_to_text: "{{prompt}}"').replace("word_perplexity", "acc")
    task = task.replace("{{prompt}} {{answer}}", "{{answer}}")
    (place / "long.yaml").write_text(task, encoding="utf-8")
    heard = Listening()
    compared(place, "long.yaml", "long.html", watcher=heard)
    assert capfd.readouterr() == ("", "")
    assert "model: made_up_long" in heard.stages and "w2: made_up_long" in heard.stages
    assert sum("lm_eval warns: Combined length of context" in said for said in heard.said) == 2, heard.said


def test_the_caller_s_generators_are_left_alone(place: Path, found: dict[str, Any]) -> None:
    """In a process of its own: the checks of types here draw from Python's generator."""
    script = f"""
import random, numpy, torch
from logitwise.comparison import compare
states = lambda: [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
before = states()
given = dict(prompts={str(place / "prompts.txt")!r}, answer_tokens=4, device="cpu", lm_eval_limit=2)
compare({str(place / "model")!r}, [{str(place / "w2")!r}], report={str(place / "alone.html")!r},
        lm_eval={str(place / "made_up")!r}, **given)
assert states() == before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_task_that_a_model_cannot_run_ends_in_a_sentence(place: Path) -> None:
    """An answer longer than the model's positions, of which lm_eval says nothing."""
    text = (place / "made_up" / "read.yaml").read_text("utf-8").replace("loglikelihood_rolling", "loglikelihood")
    (place / "whole.jsonl").write_text(json.dumps({"prompt": "the hen " * 60, "answer": "hen."}) + "\n", "utf-8")
    text = text.replace("written.jsonl", "whole.jsonl").replace('doc_to_text: ""', 'doc_to_text: "the"')
    (place / "whole.yaml").write_text(text.replace("word_perplexity", "acc"), encoding="utf-8")
    with pytest.raises(MachineError, match="lm_eval's task made_up_read failed with model"):
        compared(place, "whole.yaml", "whole.html")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(RunFolder, "write", refuse)
    monkeypatch.setattr(standard, "load_whole", refuse)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("choice.jsonl", "none.jsonl", "the data set of lm_eval's task .*broken.yaml cannot be had"),
        ("task: made_up", "unsafe_code: true\ntask: made_up", "runs code that a model has written"),
        ("metric: acc, aggregation: mean", "metric: rouge, aggregation: mean", "metric rouge is code that"),
        ("{{prompt}}", "{{nothing.of.it}}", "broken.yaml cannot be loaded"),
        ("output_type", "doc_to_image: picture\noutput_type", "cannot be loaded|shows pictures"),
        ("doc_to_target: gold", "doc_to_target: gold\nprocess_docs: !function nowhere.at_all", "needs a package"),
        ("doc_to_target: gold", "doc_to_target: gold\nprocess_results: !function failing.always", "ZeroDivisionError"),
        ("dataset_path: json", "dataset_path: [", "cannot be loaded"),
    ],
)
def test_tasks_that_are_refused(place: Path, old: str, new: str, words: str) -> None:
    text = (place / "made_up" / "choice.yaml").read_text("utf-8")
    assert old in text
    (place / "failing.py").write_text("def always(doc, results):\n    return {'acc': 1 / 0}\n", encoding="utf-8")
    (place / "broken.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        compared(place, "broken.yaml", "refused.html")
    assert not list(place.glob("refused*"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("none.yaml", "there is no task .*none.yaml"),
        ("cot", "has no task"),
        ("made_up,made_up/choice.yaml", "made_up_choice is asked for twice"),
    ],
)
def test_paths_that_are_refused(place: Path, asked: str, words: str) -> None:
    (place / "cot").mkdir(exist_ok=True)
    with pytest.raises(RecipeError, match=words):
        compared(place, asked, "refused.html")


@pytest.mark.usefixtures("no_work")
def test_names_that_are_refused(place: Path) -> None:
    """Of lm_eval's own index, which takes seconds to read."""
    for name, words in (("wikitxt", "did you mean wikitext"), ("humaneval", "humaneval is not run")):
        with pytest.raises(RecipeError, match=words):
            compared(place, lm_eval=name)


def test_a_served_model_is_left_out(place: Path) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    from fake_server import Engine, serving
    from source_files import tokenizer
    from transformers import AutoModelForCausalLM

    heard = Listening()
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with serving(Engine(model, tokenizer())) as address:
        found = compared(place, "made_up/choice.yaml", "served.html", servers=[f"{address}#w"], watcher=heard)
    assert [model["lm_eval"] is None for model in found["models"]] == [False, False, True]
    jsonschema.validate(found, SCHEMA)
    assert "w: lm_eval's tasks are not run on a server's model" in heard.said
    line = next(line for line in summary_of(found).splitlines() if line.startswith("| made\\_up\\_choice"))
    assert line.endswith("| - |")
