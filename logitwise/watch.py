"""What a run tells whoever watches it: stages with a length, and sentences worth reading."""

from collections.abc import Iterator
from contextlib import contextmanager


class Watcher:
    """Hears what a run does and shows nothing; the terminal's watcher is a subclass."""

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator["Stage"]:
        """A part of the work that takes `total` units."""
        yield Stage()

    def say(self, sentence: str) -> None:
        """Something the user should know."""

    def detail(self, sentence: str) -> None:
        """Something that a user who asks for more wants to know."""


class Stage:
    """One part of the work under way."""

    def reach(self, units: float) -> None:
        """`units` are done in all."""

    def advance(self, units: float = 1, detail: str = "") -> None:
        """`units` more are done; `detail` says what is being done now."""


SILENT = Watcher()
