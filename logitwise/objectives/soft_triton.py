"""Soft cross-entropy on CUDA: three matrix products by cuBLAS and one Triton kernel between them.

For each chunk of positions, student and teacher are projected onto the vocabulary in one product, in float32. The
kernel, one program a row, reads both rows of the projection twice. First it finds, online, what both softmaxes, the
cross-entropy and the entropy need; then it writes q - p, in the head's type, over the student's own row. The third
product reads it there. Bias, logit scale, soft-cap and temperature are applied as logits are read.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives.chunked import counted, with_gradient

BUDGET = 480 << 20
"""Bytes of projections and gradient together; the rest of 512 MiB is for a chunk's hidden states and their product."""

TILE = 2048
WARPS = 8
LOWEST = tl.constexpr(-1e15)
"""Stands for -infinity, whose difference from itself would be no number."""


# The import hook that checks types in tests must not wrap what Triton compiles.
@triton.jit
@no_type_check
def _logits(row, columns, inside, bias, inner, outer, HAS_BIAS, HAS_CAP):
    """Final logits over the temperature, inner * x or outer * tanh(inner * x), and the slope of the tanh, or 1.

    x is the projection with its bias.
    """
    z = tl.load(row + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z *= inner
    bend = 1.0
    if HAS_CAP:
        decay = tl.exp(-2.0 * tl.abs(z))  # never above 1
        part = 1.0 / (1.0 + decay)
        bend = 4.0 * decay * part * part  # 1 - tanh^2 would round to 0 where tanh is close to 1
        tanh = (1.0 - decay) * part
        z = outer * tl.where(z < 0, -tanh, tanh)
    return tl.where(inside, z, LOWEST), bend


@triton.jit
@no_type_check
def _soft_cross_entropy(
    student,
    teacher,
    slopes,
    bias,
    cross_entropy,
    entropy,
    vocabulary,
    stride,
    slopes_stride,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
    APART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * stride
    slopes += row * slopes_stride
    lanes = tl.arange(0, TILE)

    # Every lane keeps its own maxima and sums, so that threads meet once a row and not once a tile:
    # q_sum = sum e^(z - z_max), p_sum = sum e^(t - t_max), cross = sum e^(t - t_max) (z - z_max), own likewise of t.
    z_max = tl.full([TILE], LOWEST, tl.float32)
    t_max = tl.full([TILE], LOWEST, tl.float32)
    q_sum = tl.zeros([TILE], tl.float32)
    p_sum = tl.zeros([TILE], tl.float32)
    cross = tl.zeros([TILE], tl.float32)
    own = tl.zeros([TILE], tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + lanes
        inside = columns < vocabulary
        z, _ = _logits(student, columns, inside, bias, inner, outer, HAS_BIAS, HAS_CAP)
        t, _ = _logits(teacher, columns, inside, bias, inner, outer, HAS_BIAS, HAS_CAP)
        z_top = tl.maximum(z_max, z)
        t_top = tl.maximum(t_max, t)
        fade = tl.exp(t_max - t_top)
        p = tl.exp(t - t_top)
        cross = (cross + (z_max - z_top) * p_sum) * fade + p * (z - z_top)
        own = (own + (t_max - t_top) * p_sum) * fade + p * (t - t_top)
        q_sum = q_sum * tl.exp(z_max - z_top) + tl.exp(z - z_top)
        p_sum = p_sum * fade + p
        z_max = z_top
        t_max = t_top

    z_top = tl.max(z_max, 0)
    t_top = tl.max(t_max, 0)
    fade = tl.exp(t_max - t_top)
    cross_sum = tl.sum((cross + (z_max - z_top) * p_sum) * fade, 0)
    own_sum = tl.sum((own + (t_max - t_top) * p_sum) * fade, 0)
    q_total = tl.sum(q_sum * tl.exp(z_max - z_top), 0)
    p_total = tl.sum(p_sum * fade, 0)
    tl.store(cross_entropy + row, tl.log(q_total) - cross_sum / p_total)
    tl.store(entropy + row, tl.log(p_total) - own_sum / p_total)

    for start in range(0, vocabulary, TILE):
        columns = start + lanes
        inside = columns < vocabulary
        z, bend = _logits(student, columns, inside, bias, inner, outer, HAS_BIAS, HAS_CAP)
        t, _ = _logits(teacher, columns, inside, bias, inner, outer, HAS_BIAS, HAS_CAP)
        slope = bend * (tl.exp(z - z_top) * (1.0 / q_total) - tl.exp(t - t_top) * (1.0 / p_total))
        # A slope written must not meet a projection that another thread has yet to read. In half their width slopes of
        # tile i lie on tile i / 2, so threads need only stay within APART tiles of each other, past the first APART.
        tile = start // TILE
        if (tile < APART) | (tile % APART == 0):
            tl.debug_barrier()
        tl.store(slopes + columns, slope.to(slopes.dtype.element_ty), mask=inside)


def chunk_rows(vocabulary: int, gradient_bytes: int) -> int:
    """How many positions a chunk has: two float32 projections of each, and the gradient of all, fit into BUDGET.

    A multiple of 64, as matrix products want, and at least that many.
    """
    return max(64, (BUDGET - gradient_bytes) // (8 * vocabulary) // 64 * 64)


def _projections(rows: int, vocabulary: int, device: torch.device) -> Float[Tensor, "rows vocabulary"]:
    """Room for projections; every row starts where vector loads and cuBLAS like it, whatever the vocabulary."""
    return torch.empty(rows, triton.cdiv(vocabulary, 16) * 16, device=device)[:, :vocabulary]


def _product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"]) -> None:
    """The product a @ b into `out`, which is float32 also where both are held in 16 bits."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # Triton's interpreter, in tests
        out.copy_(a @ b)


def _slopes(
    z: Float[Tensor, "rows vocabulary"], head: Head, temperature: float
) -> tuple[Float[Tensor, "n vocabulary"], Float[Tensor, "2 n"]]:
    """From projections of n students and then n teachers: q - p over the students', cross-entropies and entropies.

    The slopes lack the factor scale / temperature, which is the same for all.
    """
    n, vocabulary = len(z) // 2, z.shape[1]
    slopes = z[:n].view(head.weight.dtype)[:, :vocabulary]
    figures = torch.empty(2, n, device=z.device)
    _soft_cross_entropy[(n,)](
        z[:n],
        z[n:],
        slopes,
        z if head.bias is None else head.bias,
        figures[0],
        figures[1],
        vocabulary,
        z.stride(0),
        slopes.stride(0),
        head.scale / (temperature if head.soft_cap is None else head.soft_cap),
        1.0 if head.soft_cap is None else head.soft_cap / temperature,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.soft_cap is not None,
        TILE=TILE,
        APART=8 if head.weight.itemsize == 2 else 1,
        num_warps=WARPS,
    )
    return slopes, figures


def soft_cross_entropy(
    student: Float[Tensor, "tokens d"],
    teacher: Float[Tensor, "tokens d"],
    weights: Float[Tensor, "tokens"],
    head: Head,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean cross-entropy, with its gradient, and the teacher's mean entropy, as `soft.soft_cross_entropy` has them.

    Hidden states and head are float32, bfloat16 or float16 alike. Above its inputs it holds at most 512 MiB, the
    gradient among them, unless that gradient leaves no room for 64 positions.
    """
    vocabulary, d = head.weight.shape
    with torch.no_grad(), torch.cuda.device_of(student):
        gradient = torch.zeros_like(student)
        means = torch.zeros(2, device=student.device)
        rows = min(chunk_rows(vocabulary, gradient.nbytes), max(1, len(student)))
        projections = _projections(2 * rows, vocabulary, student.device)
        products = torch.empty(rows, d, device=student.device)
        for index, share in counted(weights.float(), rows):
            n = len(index)
            _product(torch.cat((student[index], teacher[index])), head.weight.T, out=projections[: 2 * n])
            slopes, figures = _slopes(projections[: 2 * n], head, temperature)
            means += (figures * share).sum(-1)
            _product(slopes, head.weight, out=products[:n])
            # A share of a probability is below what float16 can hold, so the product comes first.
            factor = (share * (head.scale / temperature)).unsqueeze(-1)
            gradient[index] = products[:n].mul_(factor).to(gradient.dtype)
    cross_entropy, entropy = means
    return with_gradient(student, cross_entropy, gradient), entropy
