"""Where a report goes: the page and its figures beside it, each under its name only when complete."""

import json
import os
from pathlib import Path
from typing import Any

from logitwise.errors import MachineError, OutputError
from logitwise.report.page import page_of


def check_places(page: Path, *read: str | Path) -> None:
    """Refuses a place where the report cannot be written, or of a file that is `read`, before any work.

    Errors: OutputError.
    """
    if page.suffix != ".html":
        raise OutputError(
            f"{page} is no name for a page", "the report is one .html file", "give a name ending in .html"
        )
    for path in (page, page.with_suffix(".json")):
        check_place(path, "--report", *read)


def check_place(path: Path, option: str, *read: str | Path) -> None:
    """Refuses a place where the file that an option asks for cannot be written, or that is `read`, before any work.

    Errors: OutputError.
    """
    if path.is_dir():
        raise OutputError(f"{path} cannot be written", "it is a folder", f"choose another {option}")
    if path.resolve() in [Path(each).resolve() for each in read]:
        raise OutputError(f"{path} cannot be written", "it is read, and would be lost", f"choose another {option}")
    parent = path.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "its folder cannot be written to" if parent.is_dir() else f"there is no folder {parent}"
        raise OutputError(f"{path} cannot be written", why, f"make the folder, or choose another {option}")


def write_report(page: Path, findings: dict[str, Any]) -> None:
    """The page and, as .json, all that is on it.

    Errors: MachineError where the disk fails; what stood there before is then as it was.
    """
    contents = {page.with_suffix(".json"): json.dumps(findings, indent=1) + "\n", page: page_of(findings)}
    for path, content in contents.items():
        write_whole(path, content)


def write_whole(path: Path, content: str) -> None:
    """A file that appears under its name when it is complete.

    Errors: MachineError where the disk fails; what stood there before is then as it was.
    """
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MachineError(f"{path} cannot be written", str(error), "free some disk; finished work is kept") from error
