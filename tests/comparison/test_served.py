"""Models behind servers, against the same models measured here: figures, what is left out, what is refused."""

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from fake_server import Engine, serving
from source_files import decided_model, llama_config, save, tokenizer

import logitwise
from logitwise.comparison import compare, served
from logitwise.errors import CalibrationError, LogitwiseError, MachineError, SourceError
from logitwise.recipe import Recipe
from logitwise.report.markdown import summary_of
from logitwise.source import open_stored
from logitwise.watch import Watcher

SCHEMA = json.loads(files("logitwise.report").joinpath("compare.schema.json").read_text("utf-8"))
PROMPTS = ["the hen met the ant", "a man and a tag", "what is it?", "then", "one more & one less"]
TEMPLATE = "{% for m in messages %}u: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


class Ears(Watcher):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, sentence: str) -> None:
        self.heard.append(sentence)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same at 3 bits, and prompts."""
    place = tmp_path_factory.mktemp("place")
    model = decided_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    save(model, place / "model")
    logitwise.quantize(place / "model", place / "w3", Recipe.load(None, method="rtn", bits=3, group_size=16))
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    lines = [json.dumps({"prompt": prompt, "answer": "7"}) for prompt in PROMPTS[:3]]
    (place / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def engine(place: Path) -> Engine:
    """The model at 3 bits, behind no server yet."""
    from transformers import AutoModelForCausalLM

    model, stored = (
        AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32),
        open_stored(place / "w3"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.read(name))
    return Engine(model, tokenizer())


@pytest.fixture(scope="module")
def here(place: Path) -> dict[str, Any]:
    """What the model at 3 bits is when it is measured here."""
    return compared(place, [], "w3", report="here.html", tasks=place / "tasks.jsonl")["models"][1]


def compared(place: Path, servers: list[str], *quantized: str, report: str = "report.html", **more: Any) -> Any:
    given = {"prompts": place / "prompts.txt", "answer_tokens": 24, "device": "cpu", **more}
    found = compare(
        place / "model", [place / name for name in quantized], servers=servers, report=place / report, **given
    ).findings
    jsonschema.validate(found, SCHEMA)
    return found


@pytest.fixture
def like_vllm(engine: Engine) -> Iterator[tuple[str, Engine]]:
    own = Engine(engine.model, engine.tokenizer, prompt_logprobs=True, says_ids=True, most=5)
    with serving(own) as url:
        yield url, own


def means(found: dict[str, Any], name: str) -> float:
    figure = found["tokens"][name]
    return figure["mean"]["mean"] if name.endswith("kl") else figure["mean"]


EXACT = ("perplexity", "top1", "top1_by_position", "flips", "endings")


def test_all_tokens_named_is_the_same_model_measured_here(
    place: Path, engine: Engine, here: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Engine(engine.model, engine.tokenizer, prompt_logprobs=True, says_ids=True)
    monkeypatch.setattr(served, "LIKELIEST", (len(engine.tokenizer),))
    with serving(own) as url:
        found = compared(place, [url], report="all.html", tasks=place / "tasks.jsonl")
    model = found["models"][1]
    assert close(model["tokens"], {**here["tokens"], "coarse": model["tokens"]["coarse"]})
    assert model["tokens"]["coarse"] == {"likeliest": len(engine.tokenizer), "left_out": 0}
    assert model["answers"] == here["answers"]
    assert model["tasks"] == here["tasks"]
    assert model["size"] is None
    assert model["served"] == {
        "address": url,
        "model": "w",
        "prompts": "token ids",
        "likeliest": len(engine.tokenizer),
        "answer_tokens_by": "server",
    }


def close(one: Any, other: Any) -> bool:
    """Whether two findings are the same but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b) for a, b in zip(one, other, strict=True))
    return one == (pytest.approx(other, rel=1e-3, abs=1e-5) if isinstance(one, float) else other)


def test_few_named_tokens_bound_kl_and_leave_the_rest_exact(
    place: Path, like_vllm: tuple[str, Engine], here: dict[str, Any]
) -> None:
    url, engine = like_vllm
    ears = Ears()
    found = compared(place, [url], watcher=ears)
    model = found["models"][1]
    assert model["name"] == "w"
    assert model["tokens"]["coarse"] == {"likeliest": 5, "left_out": 0}
    for name in EXACT:
        assert close(model["tokens"][name], here["tokens"][name]), name
    for name in ("kl", "reverse_kl"):
        assert 0 < means(model, name) < means(here, name)
        assert model["tokens"][name]["p99"] <= here["tokens"][name]["p99"] + 1e-5
    assert any("names the 5 likeliest tokens" in sentence for sentence in ears.heard)
    assert "(KL at least " in found["sentences"][0]
    assert "nothing measured here speaks against w" in found["sentences"][4] or "think twice" in found["sentences"][4]
    assert "| w | - | - | ≥ " in summary_of(found)
    assert all(isinstance(body["prompt"], list) for body in engine.asked), "nothing but token ids was sent"
    penalties = {body.get("repeat_penalty") for body in engine.asked if not body.keys() & {"prompt_logprobs", "echo"}}
    assert penalties == {1.0}, "no penalty that is the engine's default"


def test_beside_a_checkpoint_of_the_same_name(place: Path, like_vllm: tuple[str, Engine]) -> None:
    url, engine = like_vllm
    engine.names = ("w3",)
    found = compared(place, [url], "w3", report="both.html")
    assert [model["name"] for model in found["models"]] == ["model", str(place / "w3"), f"w3 at {url}"]
    stored, behind = found["models"][1:]
    assert stored["answers"] == behind["answers"]
    assert found["answers"][0]["models"][0] == found["answers"][0]["models"][1]


@pytest.mark.parametrize("takes_ids", [True, False])
def test_the_older_protocol_names_tokens_by_their_texts(
    place: Path, engine: Engine, here: dict[str, Any], takes_ids: bool
) -> None:
    own = Engine(engine.model, engine.tokenizer, echo=True, takes_ids=takes_ids)
    with serving(own) as url:
        found = compared(place, [url], report=f"echo{takes_ids}.html")
    model = found["models"][1]
    assert model["served"]["prompts"] == ("token ids" if takes_ids else "text")
    assert model["served"]["answer_tokens_by"] == "text"
    assert model["tokens"]["coarse"]["likeliest"] == 100
    left_out = model["tokens"]["coarse"]["left_out"]
    for name in ("perplexity", "top1", "endings") if not left_out else ():
        assert close(model["tokens"][name], here["tokens"][name]), name
    assert takes_ids <= (left_out == 0), "text alone may become other tokens"
    assert model["tokens"]["tokens"] + model["tokens"]["coarse"]["left_out"] == here["tokens"]["tokens"]
    assert model["answers"]["survival"][0] == 1


def test_a_bos_that_the_server_adds_is_not_sent(place: Path, engine: Engine) -> None:
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    shutil.copytree(place / "model", place / "begins", dirs_exist_ok=True)
    words.save_pretrained(place / "begins")
    own = Engine(engine.model, tokenizer(), echo=True, takes_ids=False, before=(0,))
    with serving(own) as url:
        opened = served.open_served(url, words, Ears())
        assert opened.prompts == served.TEXT_AFTER_BOS
        named = opened.named([0, *tokenizer()("the hen")["input_ids"]])
    assert named is not None
    assert own.asked[-1]["prompt"] == "the hen"


def test_without_log_probabilities_answers_alone_are_compared(
    place: Path, engine: Engine, here: dict[str, Any]
) -> None:
    own, ears = Engine(engine.model, engine.tokenizer), Ears()
    with serving(own) as url:
        found = compared(place, [url], report="greedy.html", tasks=place / "tasks.jsonl", samples=2, watcher=ears)
    model = found["models"][1]
    assert model["tokens"] is None
    assert model["served"]["likeliest"] is None
    assert model["tasks"]["accuracy"] == here["tasks"]["accuracy"]
    assert [value["k"] for value in model["tasks"]["pass_at_k"]["values"]] == [1, 2]
    assert model["answers"]["identical"] == here["answers"]["identical"]
    assert model["answers"]["ended"] == here["answers"]["ended"]
    assert any("only its answers are compared" in sentence for sentence in ears.heard)
    assert "by answers alone: w; its server gives no log-probabilities" in found["sentences"][0]
    assert "| w | - | - | - | - |" in summary_of(found)


def test_a_server_of_openai_s_settings_alone(engine: Engine) -> None:
    own = Engine(engine.model, engine.tokenizer, echo=True, strict=True)
    with serving(own) as url:
        opened = served.open_served(url, engine.tokenizer, Ears())
    assert (opened.prompts, opened.settings, opened.log_probabilities) == (served.IDS, {}, served.ECHO)


def test_full_precision_behind_a_server_is_itself(place: Path, engine: Engine) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with serving(Engine(model, engine.tokenizer)) as url:
        answers = compared(place, [url], report="itself.html")["models"][1]["answers"]
    assert answers["identical"] == 1, "full precision's answers go through text too"


def test_a_server_of_chats_alone(place: Path, engine: Engine) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    shutil.copytree(place / "model", place / "chatty", dirs_exist_ok=True)
    words.save_pretrained(place / "chatty")
    own, ears = Engine(engine.model, words, completions=False), Ears()
    with serving(own) as url:
        given = {"prompts": place / "prompts.txt", "answer_tokens": 8, "device": "cpu", "watcher": ears}
        found = compare(place / "chatty", servers=[url], report=place / "chat.html", **given).findings
        assert found["models"][1]["served"]["prompts"] == "chat"
        assert not any("the template's" in sentence for sentence in ears.heard)
        own.tokenizer = tokenizer()
        own.tokenizer.chat_template = "You are a model. " + TEMPLATE
        compare(place / "chatty", servers=[url], report=place / "chat.html", **given)
        assert any("the template's" in sentence for sentence in ears.heard)
        with pytest.raises(SourceError, match=r"cannot be given the model's own tokens\n.*no completions"):
            compared(place, [url], report="refused.html")


def test_another_tokenizer_on_the_server_is_refused(place: Path, engine: Engine) -> None:
    own = Engine(engine.model, engine.tokenizer, takes_ids=False, before=(0, 0))
    with serving(own) as url, pytest.raises(SourceError, match=r"it reads \d+ tokens in a prompt of \d+"):
        compared(place, [url], report="refused.html")


def test_several_models_behind_one_address(place: Path, like_vllm: tuple[str, Engine]) -> None:
    url, engine = like_vllm
    engine.names = ("one", "two")
    with pytest.raises(SourceError, match=r"serves several models\n.*there are one, two\n.*#one"):
        compared(place, [url], report="refused.html")
    with pytest.raises(SourceError, match=r"serves no model three\n.*there are one, two"):
        compared(place, [f"{url}#three"], report="refused.html")
    found = compared(place, [f"{url}#two", f"{url}#one"], report="two.html")
    assert [model["name"] for model in found["models"]] == ["model", "two", "one"]
    assert {body["model"] for body in engine.asked} == {"one", "two"}


def test_what_is_finished_is_kept_when_the_server_fails(
    place: Path, like_vllm: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitwise.comparison import asking

    url, engine = like_vllm
    monkeypatch.setattr(asking, "PART", 2)
    compared(place, [url], report="kept.html")
    whole, engine.asked[:] = len(engine.asked), []
    compared(place, [url], report="kept.html")
    again, engine.asked[:] = len(engine.asked), []
    assert again == whole - 2 * len(PROMPTS), "how it can be asked, and nothing else"
    engine.fails_after = again + 3
    with pytest.raises(MachineError, match=r"does not answer as it should\n.*out of memory\n.*parts are kept"):
        compared(place, [url], report="broken.html")
    assert not (place / "broken.html").exists()
    engine.fails_after, engine.asked[:] = 10**9, []
    compared(place, [url], report="broken.html")
    assert again < len(engine.asked) < whole


def test_another_model_behind_the_same_address_is_asked_again(place: Path, like_vllm: tuple[str, Engine]) -> None:
    from transformers import AutoModelForCausalLM

    url, engine = like_vllm
    before = compared(place, [url], report="same.html")["models"][1]
    engine.model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    after = compared(place, [url], report="same.html")["models"][1]
    assert means(after, "kl") < means(before, "kl") / 10
    assert after["answers"]["identical"] == 1


def test_refused_before_any_work(place: Path, like_vllm: tuple[str, Engine]) -> None:
    url, engine = like_vllm
    engine.room = 40
    refusals: list[tuple[str, type[LogitwiseError], str]] = [
        (url, SourceError, "reads at most 40 tokens"),
        ("http://127.0.0.1:9/v1", CalibrationError, "does not answer"),
        ("localhost:8000/v1", CalibrationError, "is no address"),
        ("", CalibrationError, "is no address"),
    ]
    for address, error, words in refusals:
        with pytest.raises(error, match=words) as caught:
            compared(place, [address], report="refused.html")
        assert caught.value.exit_code == 2
    assert not list(place.glob("refused*"))


def test_a_password_in_the_address_is_not_in_the_report(place: Path, like_vllm: tuple[str, Engine]) -> None:
    url, _ = like_vllm
    found = compared(place, [url.replace("http://", "http://me:secret@")], report="secret.html")
    assert found["models"][1]["served"]["address"] == url
    assert "secret" not in (place / "secret.json").read_text("utf-8")
