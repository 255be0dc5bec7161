"""Every supported family replays block by block exactly as its own forward runs."""

import pytest
import torch
from helpers import FAMILIES, VOCABULARY, MemorySource, tiny_model

from logitwise.errors import CalibrationError, SourceError
from logitwise.skeleton import Skeleton, load_whole

CPU = torch.device("cpu")


def replay(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    hidden = skeleton.embed(ids)
    with torch.no_grad():
        for block, call in enumerate(skeleton.calls(ids.shape[1])):
            hidden = skeleton.run(block, skeleton.load_block(block), hidden, call)
        head = skeleton.head()
        return head.logits(head.hidden(hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_models_own(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(VOCABULARY, (3, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
    skeleton = Skeleton(MemorySource(model), CPU, torch.float32)
    assert own.std() > 0.02
    assert (replay(skeleton, ids) - own).abs().max() <= 1e-5
    assert skeleton.prove() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_the_linear_weights_of_the_blocks(family: str) -> None:
    model = tiny_model(family)
    source = MemorySource(model)
    skeleton = Skeleton(source, CPU, torch.float32)
    weights = skeleton.load_block(1)
    slots = skeleton.slots(1)
    assert {slot.key for slot in slots} == {k for k, w in weights.items() if w.dim() == 2}
    for slot in slots:
        weight = slot.get(weights)
        assert weight.shape == (slot.out_features, slot.in_features)
        assert torch.equal(slot.put(weight), weights[slot.key])
        assert torch.equal(weights[slot.key], source.state[slot.name])
    assert any(slot.transposed for slot in slots) == (family == "gpt2")


@pytest.mark.parametrize("family", ["llama-tied", "opt", "gpt2", "gemma3", "gpt-neox"])
def test_whole_model_is_the_model(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = load_whole(MemorySource(model), CPU, torch.float32)
    with torch.no_grad():
        assert (whole(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_rows_beyond_learned_positions_are_refused(family: str) -> None:
    skeleton = Skeleton(MemorySource(tiny_model(family)), CPU, torch.float32)
    room = skeleton.model.config.max_position_embeddings
    assert len(skeleton.calls(room)) == len(skeleton)
    for use in (skeleton.calls, lambda tokens: skeleton.embed(torch.zeros(1, tokens, dtype=torch.int64))):
        with pytest.raises(CalibrationError, match=f"it has learned {room} positions"):
            use(room + 1)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_rotary_positions_read_on(family: str) -> None:
    skeleton = Skeleton(MemorySource(tiny_model(family)), CPU, torch.float32)
    assert len(skeleton.calls(skeleton.model.config.max_position_embeddings + 1)) == len(skeleton)


def test_one_block_is_in_memory_at_a_time() -> None:
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton(source, CPU, torch.float32)
    skeleton.prove()
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert set(source.reads) == set(source.names())


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(SourceError, match=r"model\.layers\.0\.mlp.*shape"):
        Skeleton(MemorySource(model), CPU, torch.float32).slots(0)


def test_a_model_that_does_not_replay_is_refused_with_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("cohere")
    skeleton = Skeleton(MemorySource(model), CPU, torch.float32)
    monkeypatch.setattr(skeleton.model.config, "logit_scale", 0.26)
    with pytest.raises(SourceError, match="differ from the model's own by up to"):
        skeleton.prove()


def test_a_model_whose_code_fails_in_the_replay_is_refused_with_its_words() -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SourceError, match="its forward stopped with RuntimeError"):
        Skeleton(MemorySource(model), CPU, torch.float32).prove()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError("Unable to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_proof_without_memory_says_nothing_of_the_model(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(self: Skeleton) -> None:
        raise error

    monkeypatch.setattr(Skeleton, "proof_logits", starved)
    with pytest.raises(type(error)) as caught:
        Skeleton(MemorySource(tiny_model("llama")), CPU, torch.float32).prove()
    assert caught.value is error
