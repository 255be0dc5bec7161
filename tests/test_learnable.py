"""Blocks to go backward through: recomputed or recorded, they are the plain composition."""

import gc
from functools import partial
from typing import cast

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model
from torch import Tensor, nn

from logitwise import learnable
from logitwise.fit import Window
from logitwise.grid import Grid
from logitwise.learnable import LearnableBlock, LearnableBlocks
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.skeleton import Skeleton

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")


def layers(count: int, device: str) -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Linear(6, 6) for _ in range(count)]
    for layer in made:
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return [layer.to(device) for layer in made]


def blocks_of(own: list[nn.Linear], ran: list[int] | None = None) -> list[LearnableBlock]:
    def run(index: int, hidden: Tensor) -> Tensor:
        if ran is not None:
            ran.append(index)
        return torch.tanh(own[index](hidden)) + hidden

    return [LearnableBlock(partial(run, index), list(layer.parameters())) for index, layer in enumerate(own)]


def plain(own: list[nn.Linear], hidden: Tensor) -> Tensor:
    for layer in own:
        hidden = torch.tanh(layer(hidden)) + hidden
    return hidden


def steps(forward: object, own: list[nn.Linear], device: str) -> list[Tensor]:
    """Parameters after three steps of descent on changing inputs."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for layer in own for p in layer.parameters()], lr=0.1)
    for _ in range(3):
        hidden = torch.randn(2, 5, 6, generator=generator).to(device)
        forward(hidden).square().mean().backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for layer in own for p in layer.parameters()]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_learning_is_that_of_the_plain_composition(count: int, device: str) -> None:
    own, peers = layers(count, device), layers(count, device)
    found = steps(LearnableBlocks(blocks_of(own), 42 * count), own, device)
    for a, b in zip(found, steps(lambda x: plain(peers, x), peers, device), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, [0, 1, 2]), (0, [0, 1, 2, 2, 1, 0])])
def test_blocks_run_once_more_going_backward_where_they_do_not_fit_together(
    free: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learnable, "free_memory", lambda device: free)
    ran: list[int] = []
    own = layers(3, "cpu")
    LearnableBlocks(blocks_of(own, ran), 126)(torch.ones(1, 2, 6)).sum().backward()
    assert ran == expected


def test_kept_or_run_again_gradients_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in (1 << 30, 0):
        monkeypatch.setattr(learnable, "free_memory", lambda device, free=free: free)
        own = layers(3, "cpu")
        found.append(steps(LearnableBlocks(blocks_of(own), 126), own, "cpu"))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_one_block_keeps_its_activations() -> None:
    ran: list[int] = []
    LearnableBlocks(blocks_of(layers(1, "cpu"), ran), 42)(torch.ones(1, 2, 6)).sum().backward()
    assert ran == [0]


@needs_gpu
def test_recorded_blocks_are_not_run_again_by_python() -> None:
    ran: list[int] = []
    own = layers(2, "cuda")
    blocks = LearnableBlocks(blocks_of(own, ran), 84)
    hidden = torch.ones(1, 2, 6, device="cuda")
    blocks(hidden).sum().backward()
    recorded = len(ran)
    for _ in range(3):
        blocks(hidden).sum().backward()
    assert len(ran) == recorded
    blocks(hidden.repeat(2, 1, 1)).sum().backward()  # another shape: not the recorded one
    assert len(ran) > recorded


@needs_gpu
def test_a_recording_that_is_gone_leaves_no_memory_behind() -> None:
    def learn() -> int:
        own = layers(2, "cuda")
        blocks = LearnableBlocks(blocks_of(own, []), 84)
        for rows in (1, 2):  # recorded, and not
            blocks(torch.ones(rows, 2, 6, device="cuda")).sum().backward()
        del own, blocks
        gc.collect()
        return torch.cuda.memory_allocated()

    assert [learn() for _ in range(3)] == [learn()] * 3


@needs_gpu
@pytest.mark.parametrize("reason", ["changes", "large"])
def test_what_changes_or_is_large_is_not_recorded(reason: str) -> None:
    ran: list[int] = []
    own = layers(1, "cuda")
    weights = learnable.RECORDED_WEIGHTS + 1 if reason == "large" else 42
    blocks = LearnableBlocks(blocks_of(own, ran), weights, may_record=reason == "large")
    for _ in range(3):
        blocks(torch.ones(1, 2, 6, device="cuda")).sum().backward()
    assert ran == [0, 0, 0]


@needs_gpu
@pytest.mark.parametrize("method", ["flexround", "signround"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_recorded_window_learns_what_one_run_again_learns(
    method: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Tensor]] = []
    for recorded in (learnable.RECORDED_WEIGHTS, 0):
        monkeypatch.setattr(learnable, "RECORDED_WEIGHTS", recorded)
        skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device("cuda"), torch.float32)
        ids = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
        last = range(3 - blocks, 3)
        window = Window(skeleton, last, skeleton.calls(12), lambda slot: slot.name.endswith("o_proj.weight"))
        quantizers = window.quantizers(QUANTIZERS[method], lambda _: Grid(3, 16, False), STARTS["searched"])
        learn, hidden = window.learn(quantizers), skeleton.embed(ids)
        found.append([])
        parameters = [p for quantizer in quantizers.values() for p in quantizer.parameters()]
        for part in (hidden[:2], hidden[2:], hidden[1:3]):
            learn(part, 0.0).square().mean().backward()
            found[-1] += [cast(Tensor, p.grad).clone() for p in parameters]
            for p in parameters:
                p.grad = None
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(*found, strict=True))
    assert any(bool(gradient.abs().max() > 0) for gradient in found[0])
