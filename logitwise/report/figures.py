"""The tables and sentences of each command, from what its public function returned."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from logitwise.convert import Exported
from logitwise.demo import Demo
from logitwise.evaluation import Contents, Evaluation, Size
from logitwise.formats import FORMATS
from logitwise.measure.figure import Figure
from logitwise.measure.likelihood import Likelihood, kl_difference
from logitwise.pipeline import Result
from logitwise.planning import Plan
from logitwise.refitting import Refitted
from logitwise.report.markdown import summary_of
from logitwise.report.terminal import clock, table

COLUMNS = ("model", "MB", "bits/w", "bits/p", "perplexity", "KL", "top-1")
KEY = (
    "bits/w: a quantized weight, scales and zeros included; bits/p: the whole file; "
    "KL: to {}, nats a token; ± one standard error over rows"
)


def show_result(console: Console, result: Result) -> None:
    """What `quantize` made."""
    report = result.report
    quantized = sum(fate["fate"] == "quantized" for fate in report["audit"])
    console.print(
        f"[bold]{escape(str(result.out))}[/]: {_megabytes(report['size_bytes'])}, {quantized} layers at "
        f"{report['bits_per_weight']:.2f} bits a weight, {report['bits_per_parameter']:.2f} bits a parameter in all"
    )
    if result.held_out_kl:
        kls = ", ".join(f"{name} {kl:.4f}" for name, kl in result.held_out_kl.items())
        console.print(f"held-out KL to full precision, nats a token: {kls}; kept: {_kept(report)}")
    _show_loading(console, result)


def show_evaluation(console: Console, found: Evaluation) -> None:
    """The figures of `evaluate`."""
    where = found.conditions
    rows = [[where["model"], *_size(found.size), *_figures(found.likelihood)]]
    if found.reference and found.reference_size:
        rows.insert(0, [where["reference"], *_size(found.reference_size), *_figures(found.reference)])
    table(console, COLUMNS, rows)
    read = f"{found.likelihood.tokens:,} tokens in {where['rows']} rows of {where['row_tokens']}"
    console.print(f"{read}; {KEY.format(escape(str(where['reference'])))}", style="dim", highlight=False)


def show_plan(console: Console, found: Plan) -> None:
    """What a run will take."""
    for name, choice in found.choices.items():
        console.print(f"{name.replace('_', ' ')}: {choice.value} ({choice.why})", style="dim", highlight=False)
    sums = f"{found.bits_per_weight:.2f} bits a weight, {found.bits_per_parameter:.2f} a parameter"
    lines = [
        ("checkpoint", _megabytes(found.size), sums),
        ("disk meanwhile", _megabytes(found.size + found.run_folder), "the run folder included"),
        ("RAM at most", _megabytes(found.ram), "Python and its libraries included"),
    ]
    if found.device_memory is not None:
        lines.append(("GPU at most", _megabytes(found.device_memory), ""))
    lines += [(name, clock(seconds), "") for name, seconds in found.seconds.items()]
    lines.append(("time in all", clock(sum(found.seconds.values())), ""))
    width = max(len(name) for name, _, _ in lines)
    console.print()
    for name, value, about in lines:
        console.print(f"  {name:<{width}}  {value:>9}  [dim]{escape(about)}[/]".rstrip(), highlight=False)
    console.print()
    console.print(f"{found.loaders}.", highlight=False)
    console.print("Layers shared by several GPUs (tensor parallel):", highlight=False)
    for reason in dict.fromkeys(found.splits.values()):
        counts = ", ".join(str(count) for count, own in found.splits.items() if own == reason)
        console.print(f"  {counts}: {escape(reason) if reason else 'yes'}", highlight=False)
    for note in found.notes:
        console.print(note, style="dim", highlight=False)


def show_contents(console: Console, found: Contents, every: bool) -> None:
    """What `inspect` found."""
    console.print(found.grid)
    console.print(f"{_megabytes(found.size.size_bytes)}, {found.size.bits_per_parameter:.2f} bits a parameter")
    if found.size.bits_per_weight is not None:
        console.print(f"{found.size.bits_per_weight:.2f} bits a quantized weight, scales and zero points included")
    if found.report:
        recipe = found.report["recipe"]
        console.print(f"made by logitwise: {recipe['method']}, final blocks by {_kept(found.report)}")
    if found.refit:
        before, after = (found.refit[which]["kl"]["mean"] for which in ("before", "after"))
        console.print(f"refitted by logitwise: held-out KL {after:.4f}, before {before:.4f}")
    for kind in sorted({kind for _, _, kind in found.tensors}):
        count = sum(stored == kind for _, _, stored in found.tensors)
        console.print(f"{count} tensor{'s' if count > 1 else ''} in {kind}")
    if every:
        table(console, ("tensor", "shape", "stored"), [[n, " x ".join(map(str, s)), k] for n, s, k in found.tensors])
    else:
        console.print("[dim]-v lists them[/]")


def show_exported(console: Console, found: Exported) -> None:
    """What `export` wrote."""
    console.print(
        f"[bold]{escape(str(found.out))}[/]: {_megabytes(found.size_bytes)}, {found.layers} layers in {found.format}"
    )


def show_refitted(console: Console, found: Refitted) -> None:
    """What `refit` came to."""
    rows = [["before", *_figures(found.before)], ["after", *_figures(found.after)]]
    table(console, ("checkpoint", "perplexity", "KL", "top-1"), rows)
    console.print(
        f"{found.before.tokens:,} held-out tokens; KL: to the original, nats a token; ± one standard error over rows",
        style="dim",
        highlight=False,
    )
    share = found.less.mean / found.before.kl.mean
    console.print(f"KL is lower by {_with_error(found.less, 4, ' ± ')} ({share:.0%}), row by row")
    console.print(f"[bold]{escape(str(found.out))}[/]: {found.changed} tensors changed, all others as they were")


def show_compared(console: Console, page: Path, findings: dict[str, Any]) -> None:
    """The summary of a comparison: drawn on a terminal, as Markdown into a pipe or a file."""
    summary = summary_of(findings)
    console.print(Markdown(summary) if console.is_terminal else Text(summary), soft_wrap=not console.is_terminal)
    console.print(f"[bold]{escape(str(page))}[/] has the charts and the answers", soft_wrap=True)


def show_demo(console: Console, found: Demo) -> None:
    """The table of the demo, an answer of each model, and how to load the result."""
    rows = [[entry.name, *_size(entry.size), *_figures(entry.likelihood)] for entry in found.entries]
    bf16 = 2 * found.result.report["parameters"]
    rows[0][1:4] = [f"{bf16 / 1e6:.1f}", "16.00", "16.00"]  # as bfloat16, in which such models are shipped
    console.print()
    table(console, COLUMNS, rows, "SmolLM2-135M-Instruct at 3 bits, on answers that it was not calibrated on")
    tokens = f"{found.entries[0].likelihood.tokens:,} tokens"
    shared = "MSE and LFQ differ in the last block alone"
    console.print(f"{tokens}; {KEY.format('full precision')}; {shared}", style="dim", highlight=False)
    mse, lfq = found.entries[-2:]
    less = kl_difference(mse.likelihood, lfq.likelihood)
    console.print(f"KL of {mse.name} less that of {lfq.name}, row by row: {less.mean:.4f} ± {less.error:.4f}")
    console.print(f"\n[bold]{escape(found.prompt)}[/]")
    for entry in found.entries:
        answer = escape(" ".join(entry.answer.split()))
        console.print(Padding(f"[bold]{entry.name}[/]: {answer} ...", (0, 0, 0, 2), expand=False))
    _show_loading(console, found.result)


def _kept(report: dict[str, Any]) -> str:
    """What the final blocks were fitted by, and whether the polish changed anything."""
    polished = report.get("polish") and report["polish"]["kept"]
    return f"{report['fitted_by']}, then polished" if polished else str(report["fitted_by"])


def _show_loading(console: Console, result: Result) -> None:
    loading = FORMATS[result.choices["format"].value].loading(str(result.out))
    console.print(f"\n{result.report['loading']}:\n\n{loading}", markup=False, highlight=False)


def _megabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _size(size: Size) -> list[str]:
    bits = "-" if size.bits_per_weight is None else f"{size.bits_per_weight:.2f}"
    return [f"{size.size_bytes / 1e6:.1f}", bits, f"{size.bits_per_parameter:.2f}"]


def _figures(found: Likelihood) -> list[str]:
    return [_with_error(found.perplexity, 1), _with_error(found.kl, 3), _with_error(found.top1, 3)]


def _with_error(figure: Figure, digits: int, sign: str = "±") -> str:
    """A figure and its error, where it has one."""
    error = "" if math.isnan(figure.error) else f"{sign}{figure.error:.{digits}f}"
    return f"{figure.mean:.{digits}f}{error}"
