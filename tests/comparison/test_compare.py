"""A comparison of tiny models from folder to page: figures, what is kept, what is refused."""

import json
import shutil
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import torch
from report_findings import findings
from rich.console import Console
from source_files import decided_model, llama_config, random_model, save

import logitwise
from logitwise.comparison import compare, teacher, written
from logitwise.errors import CalibrationError, OutputError, RecipeError, SourceError
from logitwise.recipe import Recipe
from logitwise.report.terminal import TerminalWatcher
from logitwise.runfolder import RunFolder

SCHEMA = json.loads(files("logitwise.report").joinpath("compare.schema.json").read_text("utf-8"))
PROMPTS = ["the hen met the ant", "a man and a <b>tag</b>", "what is it?", "then", "one more & one less"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same at 4 and at 2 bits, prompts and problems."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = decided_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    save(model, place / "model")
    for bits in (4, 2):
        recipe = Recipe.load(None, method="rtn", bits=bits, group_size=16)
        logitwise.quantize(place / "model", place / f"w{bits}", recipe)
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    lines = [json.dumps({"prompt": prompt, "answer": "7"}) for prompt in PROMPTS[:3]]
    (place / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    return compared(place, "w4", "w2", tasks=place / "tasks.jsonl", samples=2)


def compared(place: Path, *quantized: str, report: str = "report.html", **more: Any) -> dict[str, Any]:
    given = {"prompts": place / "prompts.txt", "answer_tokens": 24, "device": "cpu", **more}
    return compare(place / "model", [place / name for name in quantized], report=place / report, **given).findings


def test_what_is_written_is_of_the_schema(place: Path, found: dict[str, Any]) -> None:
    written = json.loads((place / "report.json").read_text("utf-8"))
    assert written == found
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(written, SCHEMA)
    jsonschema.validate(findings(), SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**written, "noise": {}}, SCHEMA)


def test_fewer_bits_are_farther(found: dict[str, Any]) -> None:
    _, four, two = found["models"]
    noise = found["noise"]["kl"]["mean"]["mean"]
    assert 0 < noise < four["tokens"]["kl"]["mean"]["mean"] / 3
    assert four["tokens"]["kl"]["mean"]["mean"] < two["tokens"]["kl"]["mean"]["mean"] / 3
    assert found["noise"]["stored_kl"] < noise
    assert two["tokens"]["flips"]["share"]["mean"] == pytest.approx(1 - two["tokens"]["top1"]["mean"], abs=1e-5)
    assert [m["tasks"]["pass_at_k"]["values"][-1]["k"] for m in found["models"]] == [2, 2, 2]
    assert "w4" in found["sentences"][0]


def test_kl_and_agreement_are_those_of_the_models_themselves(place: Path, found: dict[str, Any]) -> None:
    """By transformers alone, in float64, on the answers that stand in the run folder."""
    from source_files import tokenizer
    from transformers import AutoModelForCausalLM

    from logitwise.calibration.chat import prompt_ids
    from logitwise.source import open_stored

    teacher = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    student = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    stored = open_stored(place / "w2")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(stored.read(name))
    kl, agrees, ended = [], [], []
    for prompt in PROMPTS:
        ids = prompt_ids(tokenizer(), prompt)
        asked = torch.tensor([ids])
        whole = teacher.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=24, do_sample=False)
        ended.append(int(whole[0, -1]) == tokenizer().eos_token_id)
        with torch.no_grad():
            p, q = (m(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1) for m in (teacher, student))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agrees += (p.argmax(-1) == q.argmax(-1)).tolist()
    tokens = found["models"][2]["tokens"]
    assert tokens["tokens"] == len(kl)
    assert found["models"][0]["answers"]["ended"] == sum(ended) / len(ended)
    # What is stored of the teacher is rounded to bfloat16: that is the error.
    assert tokens["kl"]["mean"]["mean"] == pytest.approx(sum(kl) / len(kl), rel=0.02)
    assert tokens["top1"]["mean"] == pytest.approx(sum(agrees) / len(agrees), abs=1.5 / len(agrees))


def test_bins_add_up_to_the_whole(found: dict[str, Any]) -> None:
    tokens = found["models"][2]["tokens"]
    for part, whole in (("kl_by_confidence", "kl"), ("kl_by_position", "kl"), ("top1_by_position", "top1")):
        bins = tokens[part]
        assert sum(one["tokens"] for one in bins) == tokens["tokens"], part
        mean = sum(one["tokens"] * one["figure"]["mean"] for one in bins) / tokens["tokens"]
        expected = tokens[whole]["mean"] if whole == "top1" else tokens[whole]["mean"]["mean"]
        assert mean == pytest.approx(expected, rel=1e-4), part
    assert tokens["kl"]["mean"]["mean"] != pytest.approx(tokens["reverse_kl"]["mean"]["mean"], rel=1e-3)
    split = tokens["confidence"]
    assert split["low_entropy"]["tokens"] + split["high_entropy"]["tokens"] == split["all"]["tokens"]


def test_nothing_is_computed_twice(place: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(teacher, "last_hidden", refuse)
    monkeypatch.setattr(written, "load_whole", refuse)
    again = compared(place, "w4", "w2", tasks=place / "tasks.jsonl", samples=2)
    assert {**again, "made": found["made"]} == found
    swapped = compared(place, "w2", "w4", tasks=place / "tasks.jsonl", report="report.html")
    assert swapped["models"][1]["tokens"] == found["models"][2]["tokens"]
    with pytest.raises(AssertionError, match="computed again"):
        compared(place, "w4", "w2", fresh=False, report="other.html")


def test_an_interrupted_comparison_goes_on(place: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at its third pass through the blocks; the next run makes the passes that are left, and no other."""
    exact, passes = teacher.last_hidden, []

    def counted(*given: Any, **more: Any) -> Any:
        passes.append(given[5])
        if len(passes) == 3:
            raise KeyboardInterrupt
        return exact(*given, **more)

    monkeypatch.setattr(teacher, "last_hidden", counted)
    with pytest.raises(KeyboardInterrupt):
        compared(place, "w4", "w2", report="broken.html")
    assert not list(place.glob("broken.html*"))
    assert not (place / "broken.json").exists()
    resumed = compared(place, "w4", "w2", report="broken.html")
    assert len(passes) == 5, "full precision, its noise, w4 (interrupted), w4, w2"
    assert [m["tokens"] for m in resumed["models"]] == [m["tokens"] for m in found["models"]]


def test_a_second_one_with_the_same_report_is_refused(place: Path, found: dict[str, Any]) -> None:
    with RunFolder(place / "report.run").alone(), pytest.raises(OutputError, match=r"another run is at work"):
        compared(place, "w4", "w2")
    compared(place, "w4", "w2")


def test_all_answers_end_where_full_precision_s_do(place: Path, found: dict[str, Any]) -> None:
    """A checkpoint's own files, as a format or a tool leaves them, say nothing of its weights."""
    other = shutil.copytree(place / "w4", place / "without")
    (other / "generation_config.json").write_text('{"eos_token_id": [3, 4, 5, 6, 7, 8, 9, 10]}')
    _, w4, _ = found["models"]
    _, same = compared(place, "without", report="without.html", tasks=place / "tasks.jsonl", samples=2)["models"]
    assert same["answers"] == w4["answers"]
    assert same["tasks"] == w4["tasks"]


def test_names_are_no_markup() -> None:
    console = Console(file=StringIO(), width=200)
    with TerminalWatcher(console).stage("q[int4]/[/bold]: answers", 1) as stage:
        stage.advance()
    assert "q[int4]/[/bold]: answers: done" in cast(StringIO, console.file).getvalue()


def test_another_answer_length_is_another_measurement(place: Path, found: dict[str, Any]) -> None:
    shorter = compared(place, "w4", answer_tokens=6)
    assert shorter["conditions"]["measured_on"]["tokens"] <= 6 * len(PROMPTS)
    assert len(shorter["models"][1]["answers"]["survival"]) <= 7


def test_sampled_answers_are_measured_too(place: Path) -> None:
    given = {"temperature": 1.0, "answer_tokens": 8, "report": "sampled.html"}
    sampled = compared(place, "w4", **given)
    again = compared(place, "w4", **given, fresh=True)
    assert sampled["models"] == again["models"]
    assert sampled["conditions"]["measured_on"]["temperature"] == 1.0


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(RunFolder, "write", refuse)
    monkeypatch.setattr(written, "load_whole", refuse)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"report": "report.txt"}, OutputError, "no name for a page"),
        ({"report": "none/report.html"}, OutputError, "there is no folder"),
        ({"prompts": "none.txt"}, CalibrationError, "there is no such file"),
        ({"tasks": "prompts.txt"}, CalibrationError, "line 1 is no problem"),
        ({"extractor": "guess", "tasks": "tasks.jsonl"}, RecipeError, "known are last-number"),
        ({"extractor": "exact"}, RecipeError, "'exact' has no tasks"),
        ({"answer_tokens": 0}, RecipeError, "answer_tokens is 0"),
        ({"samples": 3}, RecipeError, "pass@k is of problems"),
        ({"tasks": "refused.json"}, OutputError, "it is read, and would be lost"),
    ],
)
def test_refused_before_any_work(place: Path, change: dict[str, Any], error: type[Exception], words: str) -> None:
    paths = {key: place / value for key, value in change.items() if key in ("prompts", "tasks")}
    with pytest.raises(error, match=words):
        compared(place, "w4", **{"report": "refused.html", **change, **paths})
    assert not list(place.glob("refused*"))


@pytest.mark.usefixtures("no_work")
def test_models_that_are_no_pair_are_refused(place: Path) -> None:
    other = random_model(llama_config(hidden_size=32, head_dim=8, intermediate_size=64))
    save(other, place / "other")
    with pytest.raises(SourceError, match="is not a version of"):
        compared(place, "other", report="refused.html")
    with pytest.raises(SourceError, match="w4 is quantized"):
        compare(place / "w4", [place / "w2"], report=place / "refused.html")
    with pytest.raises(SourceError, match="no quantized model was given"):
        compared(place, report="refused.html")


@pytest.mark.usefixtures("no_work")
def test_another_tokenizer_is_refused(place: Path) -> None:
    import shutil

    from source_files import LETTERS, SPECIAL, tokenizer

    shutil.copytree(place / "model", place / "reordered", dirs_exist_ok=True)
    tokens = [*SPECIAL, *reversed(LETTERS), "th", "the", "an"]
    tokenizer(tokens).save_pretrained(place / "reordered")
    with pytest.raises(SourceError, match="have different tokenizers"):
        compared(place, "reordered", report="refused.html")
