"""The command line: one function a command, each a call of one public function."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import Signature, signature
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from logitwise.errors import InputError, LogitwiseError, MachineError, RecipeError, UnmetError
from logitwise.launch import rank, speaker, started

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

INTERRUPTED, TERMINATED = 130, 143

UNBROKEN = 1000
"""Columns of what is not read on a terminal: a line there is a line."""

PAUSE = 2.0
"""Seconds before another process than the first says what it refuses: torchrun ends it, where the first has said so."""

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no remarks.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Also details, such as what each fit came to.")]
Log = Annotated[Path | None, typer.Option("--log", help="Also write progress and remarks to this file.")]


def _version(asked: bool) -> bool:
    if asked:
        from logitwise.machine import versions

        for package, version in sorted(versions().items(), key=lambda each: each[0] != "logitwise"):
            print(package, version)
        raise typer.Exit
    return asked


@app.callback()
def of_all(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it, and those of what decides results."),
    ] = False,
) -> None:
    """Low-bit quantization of language models that looks at the token probabilities (LFQ)."""


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder of safetensors, a .gguf file or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    bits: Annotated[int | None, typer.Option(help="Bits a weight, 2 to 8 (4).")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale (64).")] = None,
    per_channel: Annotated[bool, typer.Option("--per-channel", help="One scale for each output channel.")] = False,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="A fixed zero point, or one that is chosen (asymmetric)."),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits a weight on average, scales included, given to the layers where they matter."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="flexround, lrq, signround, block_ap, lwc, gsq or rtn.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="What fits the final blocks (lfq), or mse, logit_mse, mixed, topk, hard_labels, teacher_argmax."
        ),
    ] = None,
    final_blocks: Annotated[
        str | None, typer.Option(help="Blocks at the end that the objective fits together (1), or all.")
    ] = None,
    polish: Annotated[
        bool | None, typer.Option("--polish/--no-polish", help="Tune all scales together afterwards.")
    ] = None,
    polish_steps: Annotated[int | None, typer.Option(help="Optimiser steps of the polish (300).")] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Where a fit starts: searched, minmax; with what inputs are like: weighted, neuqi, gptq, quantease."
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="auto, compressed-tensors, gptq, awq, mlx or gguf.")
    ] = None,
    scale_dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="self, self:PROMPTS, server:URL, text:FILE, jsonl:FILE or hf:NAME.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Calibration rows.")] = None,
    row_tokens: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    rows_last: Annotated[int | None, typer.Option(help="Calibration rows of the final blocks.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Rows that choose the iterate and the verdict.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps a block.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Leave layers of this pattern in full precision.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random (0).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    recipe: Annotated[str | None, typer.Option(help="quick, standard, best, whole or a TOML file.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other recipe key, as key=value.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Reuse nothing of an earlier, interrupted run.")] = False,
    keep_run: Annotated[bool, typer.Option("--keep-run", help="Leave OUT.run in place.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 where a fit gained nothing and was not kept.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the written checkpoint back.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take, as `plan` does.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = None,
) -> None:
    """Quantize a model block by block, the final blocks by the token probabilities, and write a checkpoint."""
    options = locals()  # its arguments, and nothing else yet
    if dry_run:
        _plan(options)
        return
    with _watching(quiet, verbose, log, many=True) as watcher:
        made = _recipe(options)
        from logitwise.pipeline import quantize as run
        from logitwise.report.figures import show_result

        result = run(
            model,
            out,
            made,
            overwrite=overwrite,
            fresh=fresh,
            keep_run=keep_run,
            revision=revision,
            verify=not no_verify,
            watcher=watcher,
        )
        if rank() == 0:
            show_result(_console(), result)
        if strict and result.unmet:
            raise UnmetError(result.unmet[0], "--strict was given", f"the checkpoint is at {out} all the same")


def _recipe(options: dict[str, Any]) -> Any:
    """The recipe that the options of a command ask for."""
    from logitwise.recipe import Recipe

    changes = {name: value for name, value in options.items() if name in Recipe.model_fields and value is not None}
    if options["per_channel"]:
        if "group_size" in changes:
            raise RecipeError(
                "--per-channel and --group-size exclude each other",
                "a channel's scale is shared by the whole row",
                "give one of them",
            )
        changes["group_size"] = None
    return Recipe.load(options["recipe"], **_with_settings(changes, options["settings"]))


def _with_settings(changes: dict[str, Any], pairs: list[str] | None) -> dict[str, Any]:
    """What the options change, and what `--set` does."""
    from logitwise.recipe import parse_settings

    settings = parse_settings(pairs or [])
    for key in changes.keys() & settings.keys():
        raise RecipeError(f"{key} is given twice", "--set has it, and an option of its own", "leave one of them out")
    return {**changes, **settings}


def _options_of(command: Callable[..., None], *left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a function of **options the arguments of a command."""

    def of(function: Callable[..., None]) -> Callable[..., None]:
        parameters = [own for own in signature(command).parameters.values() if own.name not in left_out]
        function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return function

    return of


@app.command()
@_options_of(quantize, "out", "overwrite", "fresh", "keep_run", "strict", "no_verify", "dry_run")
def plan(**options: Any) -> None:
    """What `quantize` with the same options would take: size, disk, memory, time, and which engines serve it."""
    _plan(options)


def _plan(options: dict[str, Any]) -> None:
    with _watching(options["quiet"], options["verbose"], options["log"]) as watcher:
        made = _recipe(options)
        from logitwise.planning import plan as run
        from logitwise.planning import refuse_unmet
        from logitwise.report.figures import show_plan

        found = run(options["model"], made, out=options.get("out"), revision=options["revision"], watcher=watcher)
        show_plan(_console(), found)
        refuse_unmet(found)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint, quantized or not.")],
    reference: Annotated[str | None, typer.Option(help="The full-precision model, for KL and agreement.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="JSON lines: text, prompt and completion, or messages.")] = None,
    rows: Annotated[int, typer.Option(help="At most so many rows.")] = 64,
    row_tokens: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = None,
) -> None:
    """Perplexity, KL and top-1 agreement with another model, teacher-forced, each with its standard error."""
    if (text is None) == (jsonl is None):
        raise RecipeError(
            "no text to evaluate on" if text is None else "two texts", "figures are of one", "give --text or --jsonl"
        )
    with _watching(quiet, verbose, log) as watcher:
        from logitwise.evaluation import evaluate as run
        from logitwise.report.figures import show_evaluation
        from logitwise.report.files import check_place, write_whole

        if json_file is not None:
            check_place(json_file, "--json", *filter(None, (text, jsonl)))
        spec = f"text:{text}" if text is not None else f"jsonl:{jsonl}"
        found = run(
            model, text=spec, reference=reference, rows=rows, row_tokens=row_tokens, device=device, watcher=watcher
        )
        show_evaluation(_console(), found)
        if json_file is not None:
            write_whole(json_file, json.dumps(found.as_json(), indent=2) + "\n")


@app.command()
def compare(
    original: Annotated[str, typer.Argument(metavar="FP", help="The full-precision model: folder, .gguf or hub id.")],
    report: Annotated[Path, typer.Option(help="The page to write; its figures go beside it as .json.")],
    quantized: Annotated[list[str] | None, typer.Argument(metavar="[Q1 ...]", help="Checkpoints made of it.")] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL[#MODEL]", help="A server (.../v1) of a model made of it; may be given again."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or JSON lines (the package's own).")] = None,
    tasks: Annotated[str | None, typer.Option(help="JSON lines of prompt and answer, or problems: arithmetic.")] = None,
    extractor: Annotated[
        str | None, typer.Option(help="last-number (default), after-answer, after-hashes, gsm8k, choice or exact.")
    ] = None,
    lm_eval: Annotated[
        str, typer.Option(metavar="TASKS", help="lm_eval's tasks, or .yaml files, with commas: wikitext,gsm8k.")
    ] = "",
    lm_eval_limit: Annotated[int | None, typer.Option(help="The first so many documents of each of these.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the answers that all are measured on; 0: greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Answers sampled to each problem, for pass@k.")] = 0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Reuse nothing of an earlier run.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = None,
) -> None:
    """What quantization did to the text that a model writes, here or on a server: KL, flips, answers, on one page."""
    with _watching(quiet, verbose, log) as watcher:
        from logitwise.comparison import compare as run
        from logitwise.report.figures import show_compared

        found = run(
            original,
            quantized or [],
            report=report,
            servers=server or [],
            prompts=prompts,
            tasks=tasks,
            extractor=extractor,
            lm_eval=lm_eval,
            lm_eval_limit=lm_eval_limit,
            answer_tokens=answer_tokens,
            temperature=temperature,
            samples=samples,
            seed=seed,
            device=device,
            revision=revision,
            fresh=fresh,
            watcher=watcher,
        )
        show_compared(_console(), found.report, found.findings)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[str, typer.Option("--format", help="compressed-tensors, gptq, awq, mlx or gguf.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the written checkpoint back.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = None,
) -> None:
    """Write a quantized checkpoint in another format: the same weights, or a refusal that names what fits."""
    with _watching(quiet, verbose, log) as watcher:
        from logitwise.convert import export as run
        from logitwise.report.figures import show_exported

        show_exported(
            _console(), run(checkpoint, out, format, overwrite=overwrite, verify=not no_verify, watcher=watcher)
        )


@app.command()
def refit(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint, made by any tool.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    original: Annotated[str, typer.Option(help="The model that it was quantized from: folder, .gguf or hub id.")],
    final_blocks: Annotated[
        str | None, typer.Option(help="Blocks at the end that are refitted together (1), or all.")
    ] = None,
    polish: Annotated[
        bool | None, typer.Option("--polish/--no-polish", help="Tune the scales of all blocks afterwards.")
    ] = None,
    polish_steps: Annotated[int | None, typer.Option(help="Optimiser steps of the polish (40).")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="self, self:PROMPTS, server:URL, text:FILE, jsonl:FILE or hf:NAME.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Calibration rows (96).")] = None,
    row_tokens: Annotated[int | None, typer.Option(help="Tokens a row (256).")] = None,
    held_out: Annotated[int | None, typer.Option(help="Rows that choose the iterate and the verdict (16).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the final blocks (60).")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows a step (4).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random (0).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A TOML file in place of the preset refit.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other recipe key, as key=value.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Reuse nothing of an earlier, interrupted run.")] = False,
    keep_run: Annotated[bool, typer.Option("--keep-run", help="Leave OUT.run in place.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the written checkpoint back.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = None,
) -> None:
    """Make a quantized checkpoint of any tool better: same format, grid and size, other codes and scales."""
    given = {
        "final_blocks": final_blocks,
        "polish": polish,
        "polish_steps": polish_steps,
        "calibration": calibration,
        "rows": rows,
        "row_tokens": row_tokens,
        "held_out": held_out,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "device": device,
    }
    with _watching(quiet, verbose, log) as watcher:
        from logitwise.recipe import REFIT, Recipe
        from logitwise.refitting import refit as run
        from logitwise.report.figures import show_refitted

        changes = {name: value for name, value in given.items() if value is not None}
        result = run(
            checkpoint,
            out,
            original=original,
            recipe=Recipe.load(recipe or REFIT, **_with_settings(changes, settings)),
            overwrite=overwrite,
            fresh=fresh,
            keep_run=keep_run,
            revision=revision,
            verify=not no_verify,
            watcher=watcher,
        )
        show_refitted(_console(), result)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, quantized or not.")],
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="List every tensor.")] = False,
) -> None:
    """What is in a checkpoint: bits, grids, sizes, what is quantized and what not."""
    _alone()
    from logitwise.evaluation import inspect as run
    from logitwise.report.figures import show_contents

    show_contents(_console(), run(checkpoint), verbose)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoints go.")] = Path("demo"),
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = None,
) -> None:
    """SmolLM2-135M-Instruct at 3 bits, its last block fitted by MSE and by LFQ, in minutes on two cores."""
    with _watching(quiet, verbose, log) as watcher:
        from logitwise.demo import demo as run
        from logitwise.report.figures import show_demo

        show_demo(_console(), run(folder, watcher))


def _console(stderr: bool = False) -> Console:
    """Where tables and sentences go; into a file or a pipe lines are not broken, unless COLUMNS says where."""
    drawn = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if drawn else UNBROKEN)


def _alone() -> None:
    """Errors: RecipeError where there are many processes and the command is not for them."""
    if started() > 1:
        raise RecipeError("the command runs in one process", f"there are {started()}", "start it without torchrun")


@contextmanager
def _watching(quiet: bool, verbose: bool, log: Path | None, many: bool = False) -> Iterator[Any]:
    """A watcher of the terminal, and of the log file where one is asked for.

    Errors: RecipeError where there are many processes and the command is not for them.
    """
    if not many:
        _alone()
    import warnings

    import transformers

    from logitwise.memory import enough_memory
    from logitwise.report.terminal import TerminalWatcher, Together

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not verbose:
        warnings.simplefilter("ignore")
    terminal = TerminalWatcher(_console(stderr=True), quiet, verbose)
    with ExitStack() as open_now:
        open_now.enter_context(enough_memory("choose another --device, smaller numbers, or a machine with more"))
        if log is None or rank():
            yield terminal
            return
        from logitwise.report.files import check_place

        check_place(log, "--log")
        file = open_now.enter_context(log.open("w", encoding="utf-8"))
        yield Together(terminal, TerminalWatcher(Console(file=file, width=120), verbose=True))


class _Terminated(BaseException):
    """SIGTERM has come, as schedulers and `timeout` send it."""


def _terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def main() -> None:
    """The command `logitwise`: exit codes 0 done, 1 the machine failed, 2 refused, 3 not met, 130, 143 interrupted."""
    if started() == 1:  # torchrun's own way to end its processes is not to wait for what they are in
        signal.signal(signal.SIGTERM, _terminated)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        code = app(standalone_mode=False) or 0
    except LogitwiseError as error:
        if rank() and isinstance(error, InputError):
            time.sleep(PAUSE)
        console.print(f"[bold red]{speaker()}:[/] {escape(str(error))}")
        code = error.exit_code
    except _Terminated:
        code = TERMINATED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        remedy = "make room, or give another place, and run the same command again: finished blocks are kept"
        console.print(
            f"[bold red]logitwise:[/] {escape(str(error.filename or 'a file'))} cannot be used\n"
            f"  why:  {escape(str(error.strerror or error))}\n  do:   {remedy}"
        )
        code = MachineError.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "logitwise"
        if error.format_message():  # without a word there is only the help to show
            console.print(f"[bold red]logitwise:[/] {escape(error.format_message())}\n  do:   {command} --help")
        code = 2  # a mistake in the words of the command
    if code in (INTERRUPTED, TERMINATED):
        console.print(
            "[bold]logitwise:[/] interrupted; what is finished is kept, and the same command goes on from there"
        )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
