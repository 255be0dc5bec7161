"""Self-contained HTML pages of JSON findings: style, script and findings in one file, nothing fetched.

The scripts make every element from the findings with text alone, never markup, so nothing that a model has written is
taken for a tag. The sentences stand in the page itself, for readers without scripts.
"""

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any


def page_of(kind: str, title: str, sentences: Sequence[str], findings: dict[str, Any], script: str) -> str:
    """A page.

    Args:
        kind: the command whose page it is, above the title.
        title: of the page.
        sentences: what it says first; what stands between backticks is code.
        findings: JSON values, which the script lays out.
        script: its file in `web/`.
    """
    folder = files("logitwise.pages").joinpath("web")
    page, style, *scripts = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "charts.js", "tables.js", script)
    )
    return Template(page).substitute(
        kind=html.escape(kind),
        title=html.escape(title),
        style=style,
        sentences="\n".join(f"<li>{_with_code(sentence)}</li>" for sentence in sentences),
        findings=embedded(findings),
        script="\n".join(scripts),
    )


def _with_code(sentence: str) -> str:
    """A sentence as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(sentence))


def embedded(findings: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in, whatever its texts hold."""
    text = json.dumps(findings, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
