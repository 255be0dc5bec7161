"""What a person sees in the terminal: progress with time left, sentences, tables. The only module that prints."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from logitwise.watch import Stage, Watcher


class _TimeLeft(ProgressColumn):
    """Time left while a stage runs, time taken once it is done."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"{clock(task.elapsed)}", style="green")
        if task.fields["until"] is None:
            return Text("")
        return Text(f"{clock(max(0.0, task.fields['until'] - time.monotonic()))} left", style="cyan")


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds or 0)
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
    return f"{whole // 60}:{whole % 60:02}"


class _Bar(Stage):
    def __init__(self, progress: Progress, title: str, total: float) -> None:
        self.progress, self.task = progress, progress.add_task(title, total=total, detail="", until=None)
        self.began, self.done, self.total = time.monotonic(), 0.0, total

    def advance(self, units: float = 1, detail: str = "") -> None:
        self.reach(self.done + units)
        if detail:
            self.progress.update(self.task, detail=escape(detail))

    def reach(self, units: float) -> None:
        if units > self.done:
            # When it ends is guessed when something is done, and counted down to in between.
            now, self.done = time.monotonic(), units
            until = now + (now - self.began) * (self.total - units) / units
            self.progress.update(self.task, completed=units, until=until)

    def finish(self) -> None:
        task = self.progress.tasks[0]
        self.progress.update(self.task, completed=task.total, detail="")


class TerminalWatcher(Watcher):
    """Shows stages as bars and sentences as lines, on stderr.

    Args:
        console: where to.
        quiet: show neither.
        verbose: show details too.
    """

    def __init__(self, console: Console, quiet: bool = False, verbose: bool = False) -> None:
        self.console, self.quiet, self.verbose = console, quiet, verbose

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[Stage]:
        if self.quiet:
            yield Stage()
            return
        if not self.console.is_terminal:
            yield from self._plain(title, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            _TimeLeft(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            bar = _Bar(progress, escape(f"{title:<24}"), total)
            yield bar
            bar.finish()

    def _plain(self, title: str, total: float) -> Iterator[Stage]:
        """Into a file or a pipe: a line every minute in place of a bar."""
        began = time.monotonic()
        yield _Lines(self.console, title, total)
        self.console.print(f"{title}: done in {clock(time.monotonic() - began)}", highlight=False, markup=False)

    def say(self, sentence: str) -> None:
        if not self.quiet:
            self.console.print(sentence, highlight=False, markup=False)

    def detail(self, sentence: str) -> None:
        if self.verbose:
            self.say(sentence)


class _Lines(Stage):
    def __init__(self, console: Console, title: str, total: float) -> None:
        self.console, self.title, self.total = console, title, total
        self.done, self.began, self.spoke = 0.0, time.monotonic(), time.monotonic()
        self.detail = ""

    def advance(self, units: float = 1, detail: str = "") -> None:
        self.reach(self.done + units, detail)

    def reach(self, units: float, detail: str = "") -> None:
        self.done, now, self.detail = units, time.monotonic(), detail or self.detail
        if now - self.spoke > 60 and 0 < units < self.total:
            left = (now - self.began) * (self.total - units) / units
            self.console.print(
                ", ".join(
                    filter(
                        None, [f"{self.title}: {100 * units / self.total:.0f} %", f"{clock(left)} left", self.detail]
                    )
                ),
                highlight=False,
                markup=False,
            )
            self.spoke = now


class _Both(Stage):
    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages

    def advance(self, units: float = 1, detail: str = "") -> None:
        for stage in self.stages:
            stage.advance(units, detail)

    def reach(self, units: float) -> None:
        for stage in self.stages:
            stage.reach(units)


class Together(Watcher):
    """Several watchers of one run: the terminal and a log file."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[Stage]:
        with ExitStack() as stack:
            yield _Both([stack.enter_context(watcher.stage(title, total)) for watcher in self.watchers])

    def say(self, sentence: str) -> None:
        for watcher in self.watchers:
            watcher.say(sentence)

    def detail(self, sentence: str) -> None:
        for watcher in self.watchers:
            watcher.detail(sentence)


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints rows under columns; the first column to the left, the others to the right."""
    drawn = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1))
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index > 0)
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    console.print(drawn)
