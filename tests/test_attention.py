"""Attention goes backward in one order where torch is to be deterministic, and torch's settings stay as they were."""

from collections.abc import Iterator

import pytest
import torch
from helpers import MemorySource, tiny_model
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.functional import scaled_dot_product_attention

from logitwise.attention import ordered_attention
from logitwise.machine import repeatable
from logitwise.skeleton import Skeleton

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="attention adds up in one order on a CPU")


def settings() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def graph(node: Node | None) -> Iterator[Node]:
    """A node and all that it is made from."""
    if node is not None:
        yield node
        for before, _ in node.next_functions:
            yield from graph(before)


@pytest.mark.parametrize("asked", [True, False])
def test_of_a_block_attention_alone_is_strict_and_only_where_asked(asked: bool) -> None:
    skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device("cpu"), torch.float32)
    (call, *_), weights = skeleton.calls(9), skeleton.load_block(0)
    hidden = torch.randn(2, 9, skeleton.model.config.hidden_size, requires_grad=True)
    seen: dict[bool, set[tuple[bool, bool]]] = {True: set(), False: set()}

    def backward() -> None:
        out = skeleton.run(0, weights, hidden, call)
        for node in set(graph(out.grad_fn)):
            fused = node.name().startswith("ScaledDotProduct")
            node.register_prehook(lambda _, fused=fused: seen[fused].add(settings()))
        out.sum().backward()

    before = settings()
    if asked:
        with repeatable():
            backward()
            assert settings() == (True, True)
    else:
        backward()
    assert settings() == before
    assert seen == {True: {(asked, False)}, False: {(asked, asked)}}


@needs_gpu
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_on_a_gpu_are_the_same_bits_each_time(masked: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(4, 2, 16, 2048, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="cuda").tril() if masked else None
    query, key, value, gradient = made

    def gradients() -> list[Tensor]:
        read = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with ordered_attention():
            out = scaled_dot_product_attention(*read, attn_mask=mask, is_causal=not masked)
        return list(torch.autograd.grad(out, read, gradient))

    with repeatable():
        first = gradients()
        for _ in range(5):
            assert all(torch.equal(one, other) for one, other in zip(first, gradients(), strict=True))
