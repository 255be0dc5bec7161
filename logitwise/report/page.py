"""The page of a comparison."""

from typing import Any

from logitwise import pages
from logitwise.report.sentences import listed


def page_of(findings: dict[str, Any]) -> str:
    """The page of a comparison's findings."""
    names = [model["name"] for model in findings["models"] if not model["original"]]
    title = f"{listed(names)} beside {findings['models'][0]['name']}"
    return pages.page_of("logitwise compare", title, findings["sentences"], findings, "compare.js")
