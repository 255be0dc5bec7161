"""The full-precision model's pass over its own answers, made once, and each other model beside it.

What is kept of it are the hidden states that enter the final norm, in bfloat16: logits would take a hundred times the
room. The head is applied again, chunk by chunk, for every model that is compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from logitwise.calibration.rows import Rows
from logitwise.comparison.candidates import Candidate
from logitwise.head import Head
from logitwise.measure.divergence import VERSION, Divergence, divergence
from logitwise.measure.likelihood import last_hidden
from logitwise.runfolder import RunFolder, chain
from logitwise.skeleton import Skeleton
from logitwise.watch import Watcher

BATCH = 8


@dataclass(frozen=True)
class Teacher:
    """Full precision on its own answers.

    Args:
        original: the model.
        rows: each answer after its prompt.
        hidden: what enters the final norm at each answer token, [tokens, d], bfloat16.
        key: of what was stored, on which the other models' figures depend.
        stored_kl: what the storing in bfloat16 costs, mean KL in nats a token.
    """

    original: Candidate
    rows: Rows
    hidden: Float[Tensor, "tokens d"]
    key: str
    stored_kl: float

    @property
    def answer(self) -> Int64[Tensor, " tokens"]:
        """The answer that each token belongs to."""
        return (self.rows.weights > 0).nonzero()[:, 0]

    @property
    def position(self) -> Int64[Tensor, " tokens"]:
        """The place of each token in its answer, from 0 at the first that counts."""
        counted = self.rows.weights > 0
        return (counted.cumsum(1) > 0).long().cumsum(1).sub(1)[counted]

    @property
    def written(self) -> Int64[Tensor, " tokens"]:
        """The token that full precision wrote at each position."""
        return self.rows.following[self.rows.weights > 0]

    def only(self, which: Bool[Tensor, " tokens"]) -> "Teacher":
        """The same on some of the tokens."""
        weights = self.rows.weights.clone()
        weights[weights > 0] *= which
        rows = Rows(self.rows.ids, self.rows.following, weights)
        return replace(self, rows=rows, hidden=self.hidden[which.to(self.hidden.device)])


def rows_of(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Rows:
    """A row for each prompt and its answer, of which the answer counts, padded at the right to the longest.

    No token sees those after it, so what pads a row changes nothing before.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    counts = torch.zeros(len(prompts), longest)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        counts[row, len(prompt) : len(prompt) + len(answer)] = 1
    return Rows(ids[:, :-1], ids[:, 1:], counts[:, 1:])


def teach(original: Candidate, rows: Rows, skeleton: Skeleton, folder: RunFolder, watcher: Watcher) -> Teacher:
    """Full precision's pass over the rows, in float32; read from the folder where it has been made before.

    What is stored is what all others are compared with, also in the run that stores it: a later run finds the same.
    """
    key = chain("teacher", model=original.digest, rows=rows.digest(), metric=VERSION, device=skeleton.device.type)
    if not folder.has(key):
        exact = last_hidden(skeleton, original.source, rows, BATCH, watcher, f"{original.name}: reading its answers")
        hidden, head = exact.bfloat16(), skeleton.head(original.source)
        written = rows.following[rows.weights > 0]
        rounded = divergence(exact, head, hidden, head, written)
        folder.save_tensors(key, {"hidden": hidden}, {"stored_kl": float(rounded.kl.mean())})
    hidden = folder.load_tensors(key)["hidden"].to(skeleton.device)
    return Teacher(original, rows, hidden, key, folder.record(key)["stored_kl"])


def beside(
    teacher: Teacher, head: Head, candidate: Candidate, skeleton: Skeleton, folder: RunFolder, watcher: Watcher
) -> Divergence:
    """One model beside full precision on the same rows; read from the folder where it has been measured before.

    Args:
        head: full precision's, in float32.
        skeleton: what the model is computed with; its type decides, bfloat16 gives the noise floor.
    """
    key = chain(teacher.key, model=candidate.digest, dtype=str(skeleton.dtype))
    if not folder.has(key):
        title = f"{candidate.name}: reading them"
        hidden = last_hidden(skeleton, candidate.source, teacher.rows, BATCH, watcher, title)
        found = divergence(hidden, skeleton.head(candidate.source), teacher.hidden, head, teacher.written)
        folder.save_tensors(key, vars(found), {"model": candidate.name, "metric": VERSION})
    columns = folder.load_tensors(key)
    return Divergence(**{field.name: columns[field.name] for field in fields(Divergence)})
