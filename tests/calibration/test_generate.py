"""The sampling loop against transformers' own `generate`, and what a run of it promises."""

import random

import pytest
import torch
from helpers import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3NextConfig

from logitwise.calibration.decoding import Decoder
from logitwise.calibration.generate import Sampler, answer, evenly, write_answers
from logitwise.errors import CalibrationError

LETTERS = "abcdefghijklmnopqrstuvwxyz \n?"


def letters() -> PreTrainedTokenizerFast:
    """One token a letter, ids from 3."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(LETTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def reference(model: PreTrainedModel, prompt: list[int], tokens: int, ends: list[int]) -> list[int]:
    """One prompt alone, without a cache or padding."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


FULL, SLIDING = ["llama", "gpt2", "opt"], ["mistral", "gemma3", "gemma2", "qwen2-sliding"]
LONG, SHORT = (
    (3, 7, 7, 11, 24),
    (2, 3, 3, 4, 5),
)  # prompts beyond the windows (15 to 19), and caches that grow into them


@pytest.mark.parametrize(
    ("family", "lengths"), [(family, LONG) for family in FULL + SLIDING] + [(family, SHORT) for family in SLIDING[:2]]
)
def test_greedy_answers_are_those_of_each_prompt_alone(
    family: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitwise.calibration.decoding.CACHE_STEP", 8)  # many growths
    model = tiny_model(family)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 131) for _ in range(length)] for length in lengths]
    free = [reference(model, prompt, 40, []) for prompt in prompts]
    # Ends that some answers reach early and others late or never, so that rows leave the batch.
    ends = sorted({free[0][5], free[1][9], free[3][20]})
    expected = [reference(model, prompt, 40, ends) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2
    found = answer(model, prompts, torch.tensor(ends), 40, 10**6, greedy)
    assert found == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_recorded_steps_give_the_answers_of_steps_that_are_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitwise.calibration.decoding.RECORDED_CACHE_STEP", 8)
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def count(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    model = tiny_model(family)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 131) for _ in range(length)] for length in LONG]
    ends = sorted({reference(model, prompt, 40, [])[place] for prompt, place in zip(prompts, (5, 9, 20), strict=False)})
    expected = [reference(model, prompt, 40, ends) for prompt in prompts]
    found = answer(model.to("cuda"), prompts, torch.tensor(ends, device="cuda"), 40, 10**6, greedy)
    assert found == expected
    assert replays


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_generate(family: str) -> None:
    model, tokenizer = tiny_model(family), letters()
    prompts = ["abc", "hello there", "why"]
    expected = set()
    for prompt in prompts:
        ids = tokenizer(prompt + "\n", return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=2, pad_token_id=0)
        expected.add(tuple(out[0].tolist()))
    options = {"tokens": 10**6, "answer_tokens": 20, "batch": 2, "temperature": 0.0, "seed": 0}
    assert {tuple(d.ids) for d in write_answers(model, tokenizer, prompts, **options)} == expected


def test_sampling_follows_the_temperature_and_leaves_the_global_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitwise.calibration.generate.CHUNK", 16)  # 131 tokens: the last chunk is not full
    logits = 2 * torch.randn(131, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    for temperature in (0.5, 2.0):
        draws = [
            Sampler(temperature, torch.Generator().manual_seed(3))(logits.expand(20000, -1).contiguous())
            for _ in range(2)
        ]
        assert torch.equal(draws[0], draws[1])
        frequency = torch.bincount(draws[0], minlength=131).double() / 20000
        probabilities = (logits.double() / temperature).softmax(-1)
        spread = (probabilities * (1 - probabilities) / 20000).sqrt()
        assert ((frequency - probabilities).abs() <= 4.5 * spread + 1e-4).all()
    assert torch.equal(state, torch.get_rng_state())


def test_the_seed_decides_the_answers() -> None:
    model, tokenizer = tiny_model("llama"), letters()
    options = {"tokens": 10**6, "answer_tokens": 8, "batch": 4}
    first, again, other = (write_answers(model, tokenizer, ["ab"] * 6, seed=seed, **options) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_only_the_answer_counts_and_an_end_token_is_part_of_it() -> None:
    model, tokenizer = tiny_model("llama"), letters()
    model.generation_config.eos_token_id = list(range(3, 80))  # one answer token in two ends it
    documents = write_answers(model, tokenizer, ["abc", "de"] * 8, tokens=10**6, answer_tokens=30, batch=4, seed=0)
    assert len(documents) == 16
    for document in documents:
        prompt = document.counts.index(True)
        assert document.ids[:prompt] in (tokenizer("abc\n").input_ids, tokenizer("de\n").input_ids)
        assert all(document.counts[prompt:])
        body = document.ids[prompt:]
        assert not any(token in range(2, 80) for token in body[:-1])
        assert len(body) == 30 or body[-1] in range(2, 80)


def test_it_stops_at_the_tokens_asked_for_and_reports_them() -> None:
    model, tokenizer = tiny_model("llama"), letters()
    seen: list[tuple[int, int]] = []
    documents = write_answers(
        model,
        tokenizer,
        ["question " + letter for letter in LETTERS] * 4,
        tokens=600,
        answer_tokens=20,
        batch=8,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    written = sum(len(document.ids) for document in documents)
    assert 600 <= written < 600 + 8 + 8 * 12  # at most a step of one batch, or its prompts, too many
    assert seen[-1] == (600, 600)
    assert seen == sorted(seen)


def test_the_order_of_documents_has_nothing_to_do_with_length() -> None:
    model, tokenizer = tiny_model("llama"), letters()
    prompts = ["a" * length for length in range(1, 41)]
    documents = write_answers(model, tokenizer, prompts, tokens=10**6, answer_tokens=2, batch=40, seed=0)
    places = torch.tensor([[float(i), float(len(d.ids))] for i, d in enumerate(documents)]).T
    assert abs(torch.corrcoef(places)[0, 1]) < 0.4


def test_the_templates_own_bos_is_the_only_one() -> None:
    tokenizer = letters()
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="?")
    assert tokenizer("ab").input_ids == [1, 3, 4]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}?"
    options = {"tokens": 10**6, "answer_tokens": 3, "batch": 2, "seed": 0}
    (document,) = write_answers(tiny_model("llama"), tokenizer, ["ab"], **options)
    assert document.ids[: document.counts.index(True)] == [1, 3, 4, 31]


def test_a_prompt_that_fills_the_positions_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"a prompt of 101 tokens leaves no room for an answer\n.*96 positions"):
        write_answers(tiny_model("gpt2"), letters(), ["a" * 100], tokens=10, answer_tokens=3, batch=1, seed=0)


def test_batches_are_even() -> None:
    assert [len(part) for part in evenly([[0]] * 67, 64)] == [33, 34]
    assert [prompt for part in evenly([[i] for i in range(10)], 4) for prompt in part] == [[i] for i in range(10)]


def test_a_model_whose_layers_keep_something_else_is_refused() -> None:
    config = Qwen3NextConfig(hidden_size=32, num_hidden_layers=4, layer_types=["linear_attention"] * 4, vocab_size=40)
    model = tiny_model("llama")
    model.config = config
    with pytest.raises(CalibrationError, match=r"layer 0 keeps a \w+ where keys and values were expected"):
        Decoder(model, 4, 8)
