"""The Triton kernel against float64 and against the eager form: on the GPU where there is one, else interpreted."""

import pytest
import torch
from numerics import HEADS, assert_loss_no_worse, make_head, random, value_and_gradient
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives import soft

pytest.importorskip("triton")

from logitwise.objectives import soft_triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]

over_heads = pytest.mark.parametrize("kind", HEADS)
over_types = pytest.mark.parametrize("dtype", TYPES)
only_on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter is too slow, or does not do it")


def cross_entropy(student: Tensor, teacher: Tensor, weights: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    return soft_triton.soft_cross_entropy(student, teacher, weights, head, temperature)[0]


def setting(tokens: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weights = random(tokens, seed=3, dtype=torch.float32, device=DEVICE).abs()
    weights[1::3] = 0
    student, teacher = (random(tokens, d, seed=seed, dtype=dtype, device=DEVICE) for seed in (1, 2))
    return student, teacher, weights


@over_types
@over_heads
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_no_worse_than_the_plain_form(
    kind: str, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_triton, "TILE", 128)  # 301 is two tiles and a part of one
    head = make_head(kind, 301, 24, dtype, DEVICE)
    assert_loss_no_worse(cross_entropy, *setting(4, 24, dtype), head, temperature)


@over_types
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1009])
def test_any_vocabulary(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_triton, "TILE", 128)
    head = make_head("bias", vocabulary, 24, dtype, DEVICE)
    assert_loss_no_worse(cross_entropy, *setting(1, 24, dtype), head)


@over_types
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), [(1, 576, 4999), (1, 16, 151_936)])
def test_real_heads(tokens: int, d: int, vocabulary: int, dtype: torch.dtype) -> None:
    assert_loss_no_worse(cross_entropy, *setting(tokens, d, dtype), make_head("plain", vocabulary, d, dtype, DEVICE))


@only_on_gpu
@over_types
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), [(1000, 576, 49_152), (300, 64, 151_936), (200, 256, 50_257)])
def test_many_positions(tokens: int, d: int, vocabulary: int, dtype: torch.dtype) -> None:
    assert_loss_no_worse(cross_entropy, *setting(tokens, d, dtype), make_head("all", vocabulary, d, dtype, DEVICE))


@only_on_gpu
def test_runs_repeat_to_the_last_bit() -> None:
    """Slopes are written where other threads still read, were they not made to wait."""
    head = make_head("soft-cap", 151_936, 64, torch.bfloat16, DEVICE)
    given = setting(700, 64, torch.bfloat16)
    value, gradient = value_and_gradient(cross_entropy, *given, head)
    for _ in range(20):
        again, gradient_again = value_and_gradient(cross_entropy, *given, head)
        assert torch.equal(again, value)
        assert torch.equal(gradient_again, gradient)


@over_heads
def test_chunks_and_masks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_triton, "TILE", 64)
    head = make_head(kind, 70, 8, torch.float32, DEVICE)
    student, teacher, weights = setting(11, 8, torch.float32)
    loss, entropy = soft_triton.soft_cross_entropy(student, teacher, weights, head)
    expected = soft.eager(student, teacher, weights, head)
    assert torch.allclose(loss, expected.cross_entropy, rtol=1e-6)
    assert torch.allclose(entropy, expected.entropy, rtol=1e-6)
    monkeypatch.setattr(soft_triton, "chunk_rows", lambda vocabulary, gradient_bytes: 3)
    student[1], teacher[4] = torch.nan, torch.nan
    value, gradient = value_and_gradient(cross_entropy, student, teacher, weights, head)
    _, expected_gradient = value_and_gradient(
        lambda *given: soft.eager(*given).cross_entropy, student, teacher, weights, head
    )
    assert torch.allclose(value, loss, rtol=1e-6)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(gradient[1::3], torch.zeros_like(gradient[1::3]))


def test_logits_of_eighty_neither_overflow_nor_vanish() -> None:
    student = torch.tensor([[80.0, -80.0, 0.0, 79.0], [-80.0, -80.0, -80.0, -80.0], [-80.0, 80.0, 80.0, -80.0]])
    teacher = torch.tensor([[-80.0, 80.0, 0.0, 0.0], [80.0, -80.0, -80.0, -80.0], [-80.0, 80.0, 80.0, -80.0]])
    given = student.to(DEVICE), teacher.to(DEVICE), torch.ones(3, device=DEVICE)
    for cap in (None, 10.0, 200.0):
        assert_loss_no_worse(cross_entropy, *given, Head({}, torch.eye(4, device=DEVICE), None, 1.0, cap))


def test_logits_far_from_zero_keep_their_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logit has 1000 on it: probabilities are what they were, and the loss is no difference of thousands."""
    monkeypatch.setattr(soft_triton, "TILE", 64)
    head = Head({}, torch.cat((torch.eye(6), torch.full((70, 6), -1.0))).to(DEVICE), None, 1.0, None)
    student, teacher, weights = setting(4, 6, torch.float32)
    expected = soft.eager(student, teacher, weights, head)
    head.bias = torch.full((76,), 1024.0, device=DEVICE)
    loss, entropy = soft_triton.soft_cross_entropy(student, teacher, weights, head)
    # Adding 1024 rounds each logit to 2^-14; nothing else may be lost.
    assert torch.allclose(loss, expected.cross_entropy, rtol=0, atol=2**-13)
    assert torch.allclose(entropy, expected.entropy, rtol=0, atol=2**-13)


@over_types
def test_the_gradient_vanishes_where_the_student_is_the_teacher(dtype: torch.dtype) -> None:
    hidden = random(3, 8, seed=1, dtype=dtype, device=DEVICE)
    weights = torch.ones(3, device=DEVICE)
    head = make_head("all", 70, 8, dtype, DEVICE)
    _, gradient = value_and_gradient(cross_entropy, hidden, hidden.clone(), weights, head)
    # Compilers fuse the two sides' sums differently, so that they agree to rounding; a slope is about 1 / 70.
    assert gradient.abs().max() <= 1e-7 * head.weight.abs().max()


@pytest.mark.parametrize("tokens", [0, 3])
def test_where_nothing_counts_the_loss_is_zero(tokens: int) -> None:
    hidden, weights = torch.full((tokens, 8), torch.nan, device=DEVICE), torch.zeros(tokens, device=DEVICE)
    head = make_head("all", 70, 8, torch.float32, DEVICE)
    value, gradient = value_and_gradient(cross_entropy, hidden, hidden, weights, head)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_rows_of_a_chunk_fit_the_budget() -> None:
    for tokens, vocabulary in ((8192, 128_256), (16_384, 128_256), (8192, 151_936), (16_384, 151_936)):
        gradient = tokens * 4096 * 2
        rows = soft_triton.chunk_rows(vocabulary, gradient)
        assert rows % 64 == 0
        assert 8 * rows * vocabulary + gradient <= 480 << 20 < 8 * (rows + 64) * vocabulary + gradient
    assert soft_triton.chunk_rows(151_936, 1 << 30) == 64


@only_on_gpu
def test_cuda_tensors_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft, "eager", None)
    head = make_head("plain", 301, 24, torch.bfloat16, DEVICE)
    assert soft.soft_cross_entropy(*setting(4, 24, torch.bfloat16), head).cross_entropy > 0


@only_on_gpu
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_peak_memory_stays_within_512_mib(tokens: int) -> None:
    head = make_head("plain", 128_256, 512, torch.bfloat16, DEVICE)
    student, teacher, _ = setting(tokens, 512, torch.bfloat16)
    weights = torch.ones(tokens, device=DEVICE)
    value_and_gradient(cross_entropy, student[:64], teacher[:64], weights[:64], head)  # cuBLAS takes its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value_and_gradient(cross_entropy, student, teacher, weights, head)
    # The leaf that value_and_gradient makes is an input.
    assert torch.cuda.max_memory_allocated() - before - student.nbytes <= 512 << 20
