"""A comparison as one self-contained HTML file: style, script and findings inside it, nothing fetched.

The script makes every element from the findings with text alone, never markup, so nothing that a model has written is
taken for a tag. The sentences stand in the page itself, for readers without scripts.
"""

import html
import json
import re
from importlib.resources import files
from string import Template
from typing import Any

PARTS = ("compare.css", "charts.js", "compare.js")


def page_of(findings: dict[str, Any]) -> str:
    """The page of a comparison's findings."""
    folder = files("logitwise.report").joinpath("web")
    template = Template(folder.joinpath("compare.html").read_text(encoding="utf-8"))
    style, charts, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in PARTS)
    told = "\n".join(f"<li>{_with_code(sentence)}</li>" for sentence in findings["sentences"])
    names = " and ".join(model["name"] for model in findings["models"] if not model["original"])
    return template.substitute(
        title=html.escape(f"{names} beside {findings['models'][0]['name']}"),
        style=style,
        sentences=told,
        findings=embedded(findings),
        script=f"{charts}\n{script}",
    )


def _with_code(sentence: str) -> str:
    """A sentence as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(sentence))


def embedded(findings: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in, whatever its texts hold."""
    text = json.dumps(findings, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
