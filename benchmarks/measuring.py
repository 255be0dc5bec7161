"""What the benchmarks on cot-22m measure with: its test rows, and a checkpoint's figures on them."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from logitwise.calibration.rows import Rows
from logitwise.measure.likelihood import as_json, likelihood, outputs
from logitwise.skeleton import Skeleton
from logitwise.source import Source


def as_rows(made: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Rows:
    """Rows as eval/cot_rows.py gives them: ids, which positions count, the ids that follow."""
    ids, mask, following = made
    return Rows(ids, following, mask.float())


def cot_tests(tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """The development rows, and the final ones together and apart."""
    from cot_rows import final_rows, rows

    tests = {"development": as_rows(rows(tokenizer, 64, 2000))}
    return tests | {f"final {kind}": as_rows(final_rows(tokenizer, kind)) for kind in ("both", "solutions", "chat")}


class Measuring:
    """Figures of a checkpoint beside those of full precision, whose outputs are found once.

    Args:
        skeleton: of the model.
        source: full precision.
        tests: rows by name.
    """

    def __init__(self, skeleton: Skeleton, source: Source, tests: dict[str, Rows]) -> None:
        self.skeleton, self.tests = skeleton, tests
        self.references = {name: outputs(skeleton, source, rows, batch=64) for name, rows in tests.items()}

    def __call__(self, made: Source) -> dict[str, Any]:
        """KL, top-1 and perplexity by the rows' name, with the KL of every row."""
        figures = {}
        for name, rows in self.tests.items():
            found = likelihood(outputs(self.skeleton, made, rows, batch=64), self.references[name], rows)
            figures[name] = {**as_json(found), "kl_by_row": found.kl_by_row.tolist()}
        return figures


def kl_line(figures: dict[str, Any]) -> str:
    """The KL on each of the rows, to print."""
    return " ".join(f"{name} {figure['kl']['mean']:.4f}" for name, figure in figures.items())
