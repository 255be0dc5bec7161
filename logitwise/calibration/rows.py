"""Rows of tokens: what every fit and every measurement reads.

Documents are packed one after another with a separator and cut into rows of equal length. A document may go on in the
next row; none is dropped, only what is left after the last whole row.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.errors import CalibrationError


@dataclass(frozen=True)
class Document:
    """One text as token ids.

    Args:
        ids: its tokens.
        counts: for each token, whether predicting it counts (an answer does, its prompt does not).
    """

    ids: list[int]
    counts: list[bool]

    @property
    def prompt(self) -> list[int]:
        """Its tokens before the first that counts."""
        return self.ids[: self.counts.index(True)] if True in self.counts else self.ids


@dataclass(frozen=True, eq=False)
class Rows:
    """Token rows.

    Args:
        ids: the tokens a model reads, [rows, tokens].
        following: the token after each, [rows, tokens].
        weights: how much the prediction made at each position counts, 0 where it does not, [rows, tokens].
    """

    ids: Int64[Tensor, "rows tokens"]
    following: Int64[Tensor, "rows tokens"]
    weights: Float[Tensor, "rows tokens"]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, which: slice | Tensor) -> "Rows":
        return Rows(self.ids[which], self.following[which], self.weights[which])

    def counted(self) -> int:
        """How many predictions count."""
        return int((self.weights > 0).sum())

    def hold(self, ids: list[int]) -> bool:
        """Whether these tokens stand in them one after another, from one row into the next too."""
        text = self.ids.flatten().tolist()
        return any(text[place : place + len(ids)] == ids for place, token in enumerate(text) if ids[:1] == [token])

    def digest(self) -> str:
        """A hash of everything in them."""
        found = hashlib.sha256()
        for tensor in (self.ids, self.following, self.weights):
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:32]

    @staticmethod
    def join(parts: "list[Rows]") -> "Rows":
        """Several sets of rows of one length, one after another."""
        return Rows(
            torch.cat([p.ids for p in parts]),
            torch.cat([p.following for p in parts]),
            torch.cat([p.weights for p in parts]),
        )


def pack(documents: Iterable[Document], separator: int, row_tokens: int) -> Rows:
    """All documents, one after another with `separator` between, cut into rows of `row_tokens`.

    Position i of a row counts when the token after it counts; the last position of a row predicts the first of the
    next. The separator itself does not count. Where a document brings the separator as its own end or beginning
    (an end-of-text or beginning-of-text token), it stands once, not twice.

    Errors: CalibrationError where not one row can be filled.
    """
    ids: list[int] = []
    counts: list[bool] = []
    for document in documents:
        skip = int(ids[-1:] == document.ids[:1] == [separator])
        ids += document.ids[skip:]
        counts += document.counts[skip:]
        if ids[-1:] != [separator]:
            ids.append(separator)
            counts.append(False)
    count = (len(ids) - 1) // row_tokens
    if count < 1:
        raise CalibrationError(
            f"{len(ids)} calibration tokens are too few",
            f"one row takes {row_tokens} tokens and the one that follows",
            "give more text, or a smaller --row-tokens",
        )
    used = count * row_tokens
    return Rows(
        torch.tensor(ids[:used]).view(count, row_tokens),
        torch.tensor(ids[1 : used + 1]).view(count, row_tokens),
        torch.tensor(counts[1 : used + 1], dtype=torch.float32).view(count, row_tokens),
    )
