"""Each figure of a token against its definition in float64, through two models' own forwards."""

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model

from logitwise.calibration.rows import Rows
from logitwise.measure.divergence import Divergence, compared, divergence
from logitwise.measure.likelihood import last_hidden
from logitwise.skeleton import Skeleton


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "cohere"])
def test_columns_are_their_definitions(family: str) -> None:
    teacher, student, noise = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    with torch.no_grad():  # near enough for some tokens to agree
        for one, other in zip(student.parameters(), noise.parameters(), strict=True):
            one.lerp_(other, 0.3)
    ids = torch.randint(VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(3))
    rows = Rows(ids[:, :-1], ids[:, 1:], torch.ones(4, 19))
    sources = MemorySource(teacher), MemorySource(student)
    skeleton = Skeleton(sources[0], torch.device("cpu"), torch.float32)
    states = [last_hidden(skeleton, source, rows) for source in sources]
    heads = [skeleton.head(source) for source in sources]
    found = divergence(states[1], heads[1], states[0], heads[0], rows.following.flatten())
    with torch.no_grad():
        p, q = (model(input_ids=rows.ids).logits.double().softmax(-1).flatten(0, 1) for model in (teacher, student))
    written = rows.following.flatten()
    index = torch.arange(len(written))
    ordered = p.sort(-1, descending=True).values
    expected = {
        "kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "entropy": -(p * p.log()).sum(-1),
        "margin": ordered[:, 0] - ordered[:, 1],
        "teacher_confidence": ordered[:, 0],
        "student_confidence": q.max(-1).values,
        "backing": p[index, q.argmax(-1)],
        "teacher_written": p[index, written],
        "student_written": q[index, written],
    }
    for name, column in expected.items():
        assert getattr(found, name).tolist() == pytest.approx(column.tolist(), rel=2e-4, abs=1e-6), name
    assert found.teacher_token.tolist() == p.argmax(-1).tolist()
    assert found.student_token.tolist() == q.argmax(-1).tolist()
    assert found.agrees.tolist() == (p.argmax(-1) == q.argmax(-1)).double().tolist()
    assert 0 < found.agrees.sum() < len(written), "the text has both"


def test_two_tokens_by_hand() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]])
    found = Divergence(*compared(p.log(), q.log(), torch.tensor([1])))
    ln3 = 1.0986123
    assert float(found.kl) == pytest.approx(0.5 * ln3, rel=1e-5)
    assert float(found.reverse_kl) == pytest.approx(0.5 * ln3, rel=1e-5)
    assert float(found.margin) == pytest.approx(0.5)
    assert (float(found.backing), float(found.student_written)) == pytest.approx((0.25, 0.75))


def test_kl_is_not_symmetric_and_the_first_is_the_teacher_s() -> None:
    """KL of (1/2, 1/2) to (9/10, 1/10) is ln(5/3); the other way round .9 ln 1.8 + .1 ln .2."""
    p, q = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.9, 0.1]]).double()
    found = Divergence(*compared(p.log(), q.log(), torch.tensor([0])))
    assert float(found.kl) == pytest.approx(0.5108256)
    assert float(found.reverse_kl) == pytest.approx(0.3680642)
