"""Keeps a library that talks, draws bars and downloads code from doing so in our terminal; for lm_eval."""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

TALKERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers", "httpx", "absl")
"""Loggers of lm_eval and of what it calls."""


class CodeRefused(Exception):
    """A metric would have been downloaded as code."""


@dataclass
class Contained:
    """What was held back.

    Args:
        warned: what lm_eval warned of, each kind of sentence once, with how often; numbers do not make another kind.
        code: names of metrics whose code the package evaluate would have downloaded and run.
    """

    warned: dict[str, tuple[str, int]] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What lm_eval warned of, and how often where that was more than once; it is forgotten then."""
        said = [text if times == 1 else f"{text} ({times} times alike)" for text, times in self.warned.values()]
        self.warned.clear()
        return said


class _Listener(logging.Handler):
    def __init__(self, held: Contained) -> None:
        super().__init__(logging.WARNING)
        self.held = held

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("lm_eval"):
            text = " ".join(record.getMessage().split())
            kind = re.sub(r"\d+", "0", text)
            first, times = self.held.warned.get(kind, (text, 0))
            self.held.warned[kind] = (first, times + 1)


@contextmanager
def contained() -> Iterator[Contained]:
    """Inside this context nothing is logged, printed or drawn as a bar by others, and `evaluate` loads no metric.

    stderr is left alone: our own progress goes there.
    """
    import evaluate.loading
    from tqdm import tqdm

    held = Contained()
    begin = tqdm.__init__

    def unseen(bar: Any, *given: Any, **more: Any) -> None:
        begin(bar, *given, **{**more, "disable": True})

    def refuse(path: str, *_: Any, **__: Any) -> None:
        held.code.append(path)
        raise CodeRefused(path)

    with ExitStack() as held_back:
        held_back.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        held_back.enter_context(redirect_stdout(io.StringIO()))
        held_back.enter_context(patch.object(tqdm, "__init__", unseen))
        # Whatever way a task has taken hold of `evaluate.load`, this is what it calls.
        held_back.enter_context(patch.object(evaluate.loading, "evaluation_module_factory", refuse))
        for logger in map(logging.getLogger, TALKERS):
            held_back.enter_context(patch.object(logger, "handlers", [_Listener(held)]))
            held_back.enter_context(patch.object(logger, "propagate", False))
        yield held
