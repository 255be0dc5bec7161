"""What engines made of checkpoints, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cases import Case
from engines import ENGINES, Difference, cpu


@dataclass(frozen=True)
class Row:
    """What an engine made of a checkpoint.

    Args:
        case: the checkpoint.
        engine: its name.
        difference: of log-probabilities; None where the engine failed.
        note: its error, in its own words; how its answer compares with ours.
        expected: whether this is as it must be.
    """

    case: Case
    engine: str
    difference: Difference | None
    note: str
    expected: bool

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.difference is None:
            return "fails"
        met = ENGINES[self.engine].gate(self.case).met(self.difference)
        return "meets" if met else "misses"

    @property
    def name(self) -> str:
        """The checkpoint, as people say it."""
        grid = str(self.case.grid or "").removesuffix(" scales")
        return "; ".join(part for part in (grid, self.case.what) if part)


INTRODUCTION = """\
# Formats in engines

Which checkpoints each engine loads, and how near its log-probabilities come to ours: of the same text, teacher-forced,
in nats. Ours are transformers' in float32, with the weights that logitwise reads from the file. The model is a random
Llama (4 blocks, hidden 256, intermediate 512, rotary base 123), every projection rounded to nearest; others are named,
and the type is that of the scales. A checkpoint meets the engine's gate or misses it; files that are wrong on purpose
(in bold) must miss. Where an engine fails, its own error stands in the row.

Gates, in nats: transformers 1e-6, and 1e-2 where it computes weights in the 16 bits of asymmetric layers' scales;
gptqmodel 2e-2, since its kernels compute in less than float32; mlx-lm 5e-5; llama.cpp 1e-4 for files dequantized to
float32 and, beside codes, where it rounds activations to 8 bits, .3 on average and .03 of the mean log-probability;
vLLM, in float16, .1, and .02 on average. What an engine is known to fail at or to leave out is in
[engines.py](../benchmarks/engines/engines.py); anything else that fails or misses is an error of `make engines`. Models
that people use are in [results](results.md#served-by-vllm-on-a-cpu), in vLLM too.

```
make formats-page
```
"""


def line(row: Row) -> str:
    """A row for the terminal."""
    found = row.difference
    figures = "" if found is None else f"largest {found.largest:.2g} mean {found.mean:.2g}"
    must = "" if row.expected else " NOT AS IT MUST BE"
    said = [row.engine, row.case.format, row.case.model, row.name, figures, row.verdict, shortened(row.note)]
    return " | ".join(part for part in said if part) + must


def page(rows: Sequence[Row], versions: Mapping[str, str], before: str) -> str:
    """The page of all small checkpoints.

    Args:
        rows: of one engine and one format.
        versions: of the engine's packages.
        before: the page, whose other sections stay; empty at first.
    """
    sections = {part.partition("\n")[0]: part for part in before.split("\n## ")[1:]}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    own = heading(rows[0].engine, rows[0].case.format)
    sections[own] = f"{own}\n\n{said}; {cpu()}.\n\n{table(rows)}"
    order = [heading(engine.name, form) for engine in ENGINES.values() for form in engine.formats]
    return "\n## ".join([INTRODUCTION, *(sections[one] for one in order if one in sections)])


def heading(engine: str, form: str) -> str:
    """That of a section."""
    return f"{form} in {engine}"


def table(rows: Iterable[Row]) -> str:
    """A line for each row."""
    head = ["checkpoint", "largest", "mean", "perplexity there", "ours", ""]
    lines = [head, ["---"] * len(head), *map(cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    model = "" if row.case.model == "random llama" else f"{row.case.model.removeprefix('random ')}: "
    name = f"**{model}{row.name}**" if row.case.wrong else f"{model}{row.name}"
    found = row.difference
    if found is None:
        return [name, "", "", "", "", f"fails: {escaped(shortened(row.note))}"]
    figures = [f"{found.largest:.1e}", f"{found.mean:.1e}", f"{found.perplexity:.6g}", f"{found.perplexity_ours:.6g}"]
    return [name, *figures, "; ".join(part for part in (row.verdict, escaped(row.note)) if part)]


def shortened(text: str, length: int = 200) -> str:
    """One line of a text, the rest left out."""
    said = " ".join(text.split())
    return said if len(said) <= length else f"{said[:length].rstrip()} ..."


def escaped(text: str) -> str:
    """A text that leaves a table's cell as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")
